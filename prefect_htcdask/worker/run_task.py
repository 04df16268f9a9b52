"""What runs on a Dask worker: a Prefect task run, in the context that the flow's process described.

Preparing that context is what makes a stock prefect-dask task slow, so it is done once for many task runs
(`context_cache`, `context`). The module is also a Dask preload (``--preload prefect_htcdask.worker.run_task``): its
teardown sends off the events and logs that are still queued, so that none dies with the worker.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import time
from collections.abc import Coroutine
from typing import Any, cast

import cloudpickle
from distributed import Worker, get_worker

from prefect_htcdask.utils.aio import in_thread
from prefect_htcdask.worker import rerun
from prefect_htcdask.worker.call import Call, CallScope, Upstream, current_call
from prefect_htcdask.worker.cancellation import interruptible
from prefect_htcdask.worker.context import task_context
from prefect_htcdask.worker.context_cache import contexts, envelopes
from prefect_htcdask.worker.dask_client import give_own_client
from prefect_htcdask.worker.metadata_cache import METADATA_ROOT, blobs

FLUSH_TIMEOUT = 15.0
"""Seconds that a leaving worker spends on its queued events and logs at most."""

logger = logging.getLogger("prefect_htcdask.worker.run_task")


def _fill(value: Any, states: list[Any]) -> Any:
    """Put the states of the upstream task runs where `Upstream` stands for them."""
    from prefect.utilities.annotations import quote
    from prefect.utilities.collections import StopVisiting, visit_collection

    from prefect_htcdask.compat.prefect import ResultRecord

    def visit(item: Any) -> Any:
        if isinstance(item, (quote, ResultRecord)):
            # Nothing stands there for a state; results may be large, and what is quoted is left alone.
            raise StopVisiting()
        return states[item.index] if isinstance(item, Upstream) else item

    return visit_collection(value, visit_fn=visit, return_data=True)


def run_call(
    envelope_key: tuple[str, ...],
    payload: bytes,
    shared: bytes | tuple[str, ...] | None,
    upstream: list[Any],
) -> Any:
    """Run one task run on this worker and return its final state. This is the function of every Dask task of ours.

    Args:
        envelope_key: where the scheduler holds the envelope.
        payload: a pickled `Call`.
        shared: parameters that several calls share, pickled, or where the scheduler holds them.
        upstream: the states of the upstream task runs.

    Returns:
        the `prefect.states.State` in which the task run ended.
    """
    scope = CallScope(tuple(envelope_key))
    give_own_client(get_worker())
    try:
        with interruptible(scope.envelope_key[0]):
            return _clean_context().run(_run_call, scope, payload, shared, upstream)
    finally:
        if scope.nested is not None:
            scope.nested.close()


def _clean_context() -> contextvars.Context:
    """A context that knows this thread's Dask worker and nothing else.

    The thread's own one may be another task run's: a task that secedes wakes the worker's event loop from its context,
    the loop starts the next task from there, and Dask hands it on.
    """
    worker = get_worker()
    clean = contextvars.Context()
    for variable, value in contextvars.copy_context().items():
        if value is worker:
            clean.run(variable.set, value)
    return clean


def _run_call(
    scope: CallScope,
    payload: bytes,
    shared: bytes | tuple[str, ...] | None,
    upstream: list[Any],
) -> Any:
    from prefect.client.schemas.objects import State

    from prefect_htcdask.compat.prefect import crashed_state
    from prefect_htcdask.worker.engine import final_state, run_async, run_sync

    current_call.set(scope)
    envelope = envelopes.get(scope.envelope_key)
    context = contexts.get(envelope.context)
    scope.offers = context.offers
    call: Call = cloudpickle.loads(payload)
    parameters = call.parameters
    if shared is not None:
        blob = blobs.get(tuple(shared)) if isinstance(shared, (tuple, list)) else shared
        # Unpickled for each call, so that a task which changes its argument does not change its neighbours'.
        values = {**cloudpickle.loads(blob), **parameters}
        parameters = {name: values[name] for name in call.order}
    wait_for = call.wait_for
    if call.upstreams:
        parameters, wait_for = _fill(parameters, upstream), _fill(wait_for, upstream)

    arguments: dict[str, Any] = {
        "task": envelope.task,
        "task_run_id": call.task_run_id,
        "parameters": parameters,
        "wait_for": wait_for,
        "dependencies": call.dependencies,
    }
    loss = rerun.loss_of_this_task()
    with task_context(context, call):
        try:
            if loss is not None:
                found = rerun.resume_task_run(arguments, loss, scope.envelope_key[0], METADATA_ROOT)
                if isinstance(found, State):
                    return found
                arguments["task_run"] = found
            state = _run_coroutine(run_async(**arguments)) if envelope.task.isasync else run_sync(**arguments)
        except (KeyboardInterrupt, SystemExit, asyncio.CancelledError) as exc:
            # The engine has recorded the crash; the worker itself has to live on for the other tasks.
            state = crashed_state(exc)
        return final_state(envelope.task, state)


def _run_coroutine(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end in an event loop of its own; Dask runs tasks in threads that have none."""
    return asyncio.run(coroutine)


def flush(timeout: float = FLUSH_TIMEOUT) -> bool:
    """Send off the queued events and logs of this process, and wait until they are sent.

    Args:
        timeout: seconds to wait at most.

    Returns:
        whether everything was sent in time.
    """
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    deadline = time.monotonic() + timeout
    complete = True
    for service in (EventsWorker, APILogWorker):
        # Called from a thread without an event loop, drain_all blocks and returns (done, not done).
        drained = cast("tuple[set[Any], set[Any]]", service.drain_all(timeout=max(0.1, deadline - time.monotonic())))
        complete = complete and not drained[1]
    if not complete:
        logger.warning("Some events or logs of Prefect could not be sent within %s s and are lost", timeout)
    return complete


def executing_keys(dask_worker: Worker) -> list[str]:
    """The keys of the Dask tasks that this worker is running just now; for `Client.run`."""
    state = dask_worker.state
    return [str(task.key) for task in (*state.executing, *state.long_running)]


async def dask_setup(worker: Worker) -> None:
    """Dask preload: import Prefect before the first task run has to wait for it, and have events outlast an outage."""
    import prefect_htcdask.worker.engine  # noqa: F401
    from prefect_htcdask.worker.api_log_handler import relay
    from prefect_htcdask.worker.prefect_services import keep_trying

    keep_trying()
    # What has been imported by now stays: no later collection has to look at it again, for an eighth of a second each.
    gc.collect()
    gc.freeze()
    if flow_run_id := getattr(worker, "flow_run_id", None):
        relay(worker, flow_run_id)


async def dask_teardown(worker: Worker) -> None:
    """Dask preload and plugin hook: send off what Prefect has queued, before the worker goes."""
    try:
        await asyncio.wait_for(in_thread(flush), FLUSH_TIMEOUT + 1)
    except asyncio.TimeoutError:
        logger.warning("Gave up on the queued events and logs of Prefect after %s s", FLUSH_TIMEOUT + 1)
