"""What runs on a Dask worker: a Prefect task run, in the context that the flow's process described.

Preparing that context is what makes a stock prefect-dask task slow, so it is done once: the *envelope* of a task
(settings, flow run, task; see `submission`) is fetched from the scheduler and hydrated once per worker process, an
API client is kept open per thread, and a task run gets cheap copies, as fresh as `prefect.context.hydrated_context`
would make them. The module is also a Dask preload (``--preload prefect_htcdask.worker_runtime``): its teardown sends
off the events and logs that are still queued, so that none dies with the worker.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, cast
from uuid import UUID

import cloudpickle
from distributed import Worker, get_worker
from distributed.utils import sync

from prefect_htcdask import rerun
from prefect_htcdask.interruption import interruptible

METADATA_ROOT = "prefect_htcdask"
"""Where the scheduler's task metadata holds the envelopes: ``[METADATA_ROOT, live run, envelope]``."""

MAX_ENVELOPES = 64
"""Hydrated envelopes that a worker process keeps; a dropped one is fetched again when it is needed."""

MAX_CLIENTS_PER_THREAD = 4
FLUSH_TIMEOUT = 15.0
"""Seconds that a leaving worker spends on its queued events and logs at most."""

logger = logging.getLogger("prefect_htcdask.worker_runtime")


@dataclass(frozen=True)
class Upstream:
    """Stands for the state of an upstream task run in parameters; Dask brings the state itself."""

    index: int


@dataclass
class Call:
    """One task run, as it is sent: everything that differs from call to call.

    `shared` names the parameters whose values come in the batch's shared blob; `order` is the order in which the
    task run sees its parameters.
    """

    task_run_id: UUID
    parameters: dict[str, Any]
    order: tuple[str, ...]
    wait_for: Any
    dependencies: dict[str, set[Any]]
    tags: tuple[str, ...]
    asset_context: dict[str, Any]
    upstreams: int


@dataclass
class Envelope:
    """A hydrated envelope: prototypes that every task run copies."""

    task: Any
    settings: Any | None
    flow_run: Any | None
    parent: Any | None
    deployment_id: UUID | None
    deployment_parameters: dict[str, Any] | None
    client_key: tuple[Any, ...]
    offers: Any
    _stack: ExitStack = field(default_factory=ExitStack)


@dataclass
class CallScope:
    """What belongs to one call while it runs: where its envelope is, and what it submits itself (`live.NestedRun`).

    `offers` is what the cluster's worker groups offer (`worker_groups.Offers`), where the flow's process knew.
    """

    envelope_key: tuple[str, ...]
    offers: Any | None = None
    nested: Any | None = None


current_call: contextvars.ContextVar[CallScope] = contextvars.ContextVar("prefect_htcdask_call")


class _EnvelopeCache:
    """Least recently used envelopes, hydrated once however many threads ask at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple[str, ...], Envelope] = OrderedDict()
        self._locks: dict[tuple[str, ...], threading.Lock] = {}

    def get(self, key: tuple[str, ...]) -> Envelope:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            with self._lock:
                if key in self._entries:
                    return self._entries[key]
            envelope = _hydrate(_fetch(key))
            with self._lock:
                self._entries[key] = envelope
                self._locks.pop(key, None)
                while len(self._entries) > MAX_ENVELOPES:
                    self._entries.popitem(last=False)
            return envelope

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()


class _BlobCache:
    """Blobs shared by the calls of a `map`, as bytes, bounded by their total size."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple[str, ...], bytes] = OrderedDict()

    def get(self, key: tuple[str, ...]) -> bytes:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        blob = _fetch(key)
        with self._lock:
            self._entries[key] = blob
            while len(self._entries) > 1 and sum(map(len, self._entries.values())) > self._limit:
                self._entries.popitem(last=False)
        return blob


_envelopes = _EnvelopeCache()
_blobs = _BlobCache(64 * 1024**2)
_thread = threading.local()


def _fetch(key: tuple[str, ...]) -> bytes:
    """Get what the flow's process left at the scheduler under `key`.

    Raises:
        HTCDaskError: the scheduler no longer has it, since the flow run is over or the scheduler was restarted.
    """
    worker = get_worker()
    blob = sync(worker.loop, worker.scheduler.get_metadata, keys=[METADATA_ROOT, *key], default=None)
    if blob is None:
        from prefect_htcdask.errors import HTCDaskError

        raise HTCDaskError(
            f"the scheduler has no description {'/'.join(key)} of this task any more: its flow run is over, or the "
            "scheduler was restarted"
        )
    return bytes(blob)


def _hydrate(blob: bytes) -> Envelope:
    """Build the prototypes of `prefect.context.hydrated_context`, without entering any of them."""
    from prefect._internal.result_records import ResultRecordMetadata
    from prefect.context import FlowRunContext, SettingsContext, TaskRunContext
    from prefect.flows import Flow
    from prefect.logging.configuration import ensure_logging_setup
    from prefect.tasks import Task

    content: dict[str, Any] = cloudpickle.loads(blob)
    context = content["context"]
    types = {"Flow": Flow, "Task": Task, "ResultRecordMetadata": ResultRecordMetadata}
    FlowRunContext.model_rebuild(_types_namespace=types)
    TaskRunContext.model_rebuild(_types_namespace=types)
    ensure_logging_setup()

    deployment_id = context.get("deployment_id")
    envelope = Envelope(
        task=content["task"],
        settings=SettingsContext(**context["settings_context"]) if context.get("settings_context") else None,
        flow_run=None,
        parent=None,
        deployment_id=UUID(deployment_id) if deployment_id else None,
        deployment_parameters=context.get("deployment_parameters"),
        client_key=content["client_key"],
        offers=content["offers"],
    )
    with _copy_of(envelope.settings), _open_client(envelope) as client:
        if flow_run := context.get("flow_run_context"):
            runner = envelope._stack.enter_context(flow_run["flow"].task_runner.duplicate())
            envelope.flow_run = FlowRunContext(**flow_run, client=client, task_runner=runner, detached=True)
        if parent := context.get("task_run_context"):
            envelope.parent = TaskRunContext(**parent, client=client)
    return envelope


@contextmanager
def _copy_of(context: Any | None, **update: Any) -> Iterator[Any | None]:
    """Enter a copy of a context model, since one object cannot be entered by two threads."""
    if context is None:
        yield None
    else:
        with context.model_copy(update=update) as entered:
            yield entered


@contextmanager
def _open_client(envelope: Envelope) -> Iterator[Any]:
    """Put this thread's open API client, for the envelope's API, into the context."""
    from prefect.context import SyncClientContext

    clients: OrderedDict[tuple[Any, ...], Any] = _thread.__dict__.setdefault("clients", OrderedDict())
    context = clients.get(envelope.client_key)
    if context is None:
        context = SyncClientContext()
        context.client.__enter__()
        context.client.raise_for_api_version_mismatch_once()
        clients[envelope.client_key] = context
        while len(clients) > MAX_CLIENTS_PER_THREAD:
            _, oldest = clients.popitem(last=False)
            with suppress(Exception):
                oldest.client.__exit__(None, None, None)
    clients.move_to_end(envelope.client_key)
    token = SyncClientContext.__var__.set(context)
    try:
        yield context.client
    finally:
        SyncClientContext.__var__.reset(token)


@contextmanager
def _task_context(envelope: Envelope, call: Call) -> Iterator[None]:
    """The context of `prefect.context.hydrated_context`, from the envelope's prototypes.

    Whatever a task run may change is new for each: the links from results to states, which Prefect keys by `id`, must
    not outlive the task run, or a later object at the same address would inherit them.
    """
    from prefect._flow_run_suspension import FlowRunSuspensionRequest
    from prefect.context import AssetContext, _deployment_id, _deployment_parameters, tags
    from prefect.results import default_cache

    with ExitStack() as stack:
        stack.enter_context(_copy_of(envelope.settings))
        client = stack.enter_context(_open_client(envelope))
        if envelope.flow_run is not None:
            store = envelope.flow_run.result_store.model_copy(update={"cache": default_cache()})
            stack.enter_context(
                _copy_of(
                    envelope.flow_run,
                    client=client,
                    result_store=store,
                    run_results={},
                    task_run_assets={},
                    task_run_dynamic_keys={},
                    observed_flow_pauses={},
                    flow_run_suspension_request=FlowRunSuspensionRequest(),
                )
            )
        stack.enter_context(_copy_of(envelope.parent, client=client))
        if call.tags:
            stack.enter_context(tags(*call.tags))
        if call.asset_context:
            stack.enter_context(AssetContext(**call.asset_context))
        if envelope.deployment_id is not None:
            stack.callback(_deployment_id.reset, _deployment_id.set(envelope.deployment_id))
        if envelope.deployment_parameters:
            stack.callback(_deployment_parameters.reset, _deployment_parameters.set(envelope.deployment_parameters))
        yield


def _fill(value: Any, states: list[Any]) -> Any:
    """Put the states of the upstream task runs where `Upstream` stands for them."""
    from prefect.utilities.collections import visit_collection

    return visit_collection(
        value,
        visit_fn=lambda item: states[item.index] if isinstance(item, Upstream) else item,
        return_data=True,
    )


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
    from prefect._internal.states import exception_to_crashed_state_sync
    from prefect.client.schemas.objects import State
    from prefect.task_engine import run_task_async, run_task_sync

    current_call.set(scope)
    envelope = _envelopes.get(scope.envelope_key)
    scope.offers = envelope.offers
    call: Call = cloudpickle.loads(payload)
    parameters = call.parameters
    if shared is not None:
        blob = _blobs.get(tuple(shared)) if isinstance(shared, (tuple, list)) else shared
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
        "return_type": "state",
        "dependencies": call.dependencies,
    }
    loss = rerun.loss_of_this_task()
    with _task_context(envelope, call):
        try:
            if loss is not None:
                found = rerun.take_up(arguments, loss, scope.envelope_key[0], METADATA_ROOT)
                if isinstance(found, State):
                    return found
                arguments["task_run"] = found
            if envelope.task.isasync:
                return _run_coroutine(run_task_async(**arguments))
            return run_task_sync(**arguments)
        except (KeyboardInterrupt, SystemExit, asyncio.CancelledError) as exc:
            # The engine has recorded the crash; the worker itself has to live on for the other tasks.
            return exception_to_crashed_state_sync(exc)


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
    import prefect.task_engine  # noqa: F401

    from prefect_htcdask.worker_events import keep_trying

    keep_trying()


async def dask_teardown(worker: Worker) -> None:
    """Dask preload and plugin hook: send off what Prefect has queued, before the worker goes."""
    try:
        await asyncio.wait_for(asyncio.to_thread(flush), FLUSH_TIMEOUT + 1)
    except asyncio.TimeoutError:
        logger.warning("Gave up on the queued events and logs of Prefect after %s s", FLUSH_TIMEOUT + 1)
