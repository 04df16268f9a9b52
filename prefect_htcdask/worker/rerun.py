"""A task run that a worker is given again, since an earlier worker was lost with it or with its result.

Where its result is at hand, persisted or collected by the flow's process, it is taken from there. Else the task run
goes on as Prefect counts it: the states that it had stay in its history, an AwaitingRetry that names the lost job
follows, and `run_count` goes up. It is no retry of the task's own; those are counted apart (`Task.retries`).
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import UUID

import cloudpickle
from distributed import get_worker
from distributed.utils import sync

from prefect_htcdask.scheduler.worker_loss import LOST_ANNOTATION

TOPIC = "htcdask-recall"
"""Start of the name of the scheduler's topic for a live run's questions; the run's id follows."""

ANSWER_TIMEOUT = 10.0
"""Seconds that the flow's process may take to answer."""

RECORD_TIMEOUT = 3.0
"""Seconds that the Prefect API may take to record what the lost worker had sent off."""

_POLL = 0.1

logger = logging.getLogger("prefect_htcdask.worker.rerun")


def loss_of_this_task() -> Mapping[str, Any] | None:
    """The mark that `WorkerLossPlugin` left on the Dask task that this thread runs, if it did."""
    worker = get_worker()
    task = worker.state.tasks.get(worker.get_current_task())
    return (task.annotations or {}).get(LOST_ANNOTATION) if task is not None else None


def resume_task_run(
    arguments: Mapping[str, Any], loss: Mapping[str, Any], run_key: str, metadata_root: str
) -> Any | None:
    """Take up a task run of which workers were lost. To be called in the task run's context.

    Args:
        arguments: those of Prefect's `run_task_sync`.
        loss: the mark.
        run_key: the live run that submitted it.
        metadata_root: where the scheduler's metadata has the answers of the flow's process.

    Returns:
        the final `State`, where it is at hand; the `TaskRun` to go on with, where it has begun before; `None` where it
        has not.
    """
    from prefect.client.schemas.objects import TaskRun

    task_run_id: UUID = arguments["task_run_id"]
    known: TaskRun | None = _recorded(task_run_id, loss)
    if known is not None and known.state is not None and known.state.is_completed():
        persisted = _persisted(known.state)
        if persisted is not None:
            return persisted
    ended = known is not None and known.state is not None and known.state.is_final()
    begun = loss["begun"] or loss["held"] or (known is not None and (known.run_count or ended))
    if not begun:
        return None
    name = known.name if known is not None else arguments["task"].name
    answer = _ask(run_key, metadata_root, task_run_id, name, loss)
    if answer.get("state") is not None:
        return answer["state"]
    why = answer.get("why") or (f"worker {loss['workers'][-1]}" if loss["workers"] else loss["why"])
    what = "its result, which is still needed, was lost" if loss["held"] or ended else "it was lost"
    return _go_on(arguments, known, loss, f"Runs again: {what} with {why}")


def _recorded(task_run_id: UUID, loss: Mapping[str, Any]) -> Any | None:
    """What the Prefect API knows of the task run; the lost worker's last events may still be on their way."""
    from prefect.context import SyncClientContext
    from prefect.exceptions import ObjectNotFound

    context = SyncClientContext.get()
    assert context is not None
    deadline = time.monotonic() + (RECORD_TIMEOUT if loss["begun"] or loss["held"] else 0.0)
    while True:
        known = None
        try:
            known = context.client.read_task_run(task_run_id)
        except ObjectNotFound:
            pass
        except Exception as exc:
            logger.warning("What became of task run %s is not known: %s", task_run_id, exc)
            return None
        state = known.state if known is not None else None
        if known is not None and state is not None and (state.is_final() if loss["held"] else known.run_count):
            return known
        if time.monotonic() >= deadline:
            return known
        time.sleep(_POLL)


def _persisted(state: Any) -> Any | None:
    """A completed state with its result, where that was persisted and can be read from here."""
    from prefect_htcdask.compat.prefect import ResultRecordMetadata, read_result

    if not isinstance(state.data, ResultRecordMetadata):
        return None
    try:
        record = read_result(state.data)
    except Exception as exc:
        # Without a cache key Prefect writes nothing, though the state names a place.
        logger.info("The persisted result %s cannot be read here: %s", state.data.storage_key, exc)
        return None
    state.data = record
    return state


def _ask(run_key: str, metadata_root: str, task_run_id: UUID, name: str, loss: Mapping[str, Any]) -> dict[str, Any]:
    """Ask the flow's process: why the worker was lost, and for the final state if it has it."""
    worker = get_worker()
    number = f"answer-{uuid.uuid4().hex}"
    place = [metadata_root, run_key, number]
    question = {
        "key": str(worker.get_current_task()),
        "number": number,
        "task_run_id": str(task_run_id),
        "name": name,
        "workers": list(loss["workers"]),
        "held": loss["held"],
        "why": loss.get("why"),
    }
    worker.log_event(f"{TOPIC}-{run_key}", question)
    deadline = time.monotonic() + ANSWER_TIMEOUT
    while (answer := sync(worker.loop, worker.scheduler.get_metadata, keys=place, default=None)) is None:
        if time.monotonic() >= deadline:
            logger.warning("The flow's process did not say what it knows of task run %s", name)
            return {}
        time.sleep(_POLL)
    sync(worker.loop, worker.scheduler.set_metadata, keys=place, value=None)
    found = {"why": answer["why"]}
    try:
        if "state" in answer:
            found["state"] = cloudpickle.loads(answer["state"])
    except Exception as exc:
        logger.warning(
            "The result of task run %s, given back by the flow's process, cannot be read here: %s", name, exc
        )
    return found


def _go_on(arguments: Mapping[str, Any], known: Any | None, loss: Mapping[str, Any], message: str) -> Any:
    """The task run with an AwaitingRetry state, of which the Prefect API is told."""
    from prefect.client.schemas.objects import StateDetails
    from prefect.states import AwaitingRetry
    from prefect.utilities.engine import emit_task_run_state_change_event

    from prefect_htcdask.compat.prefect import describe_task_run

    if known is None:
        # What the lost worker told of it was lost as well.
        known = describe_task_run(arguments["task"], arguments)
        known.run_count = loss["times"]
    before = known.state
    state: Any = AwaitingRetry(message=message, scheduled_time=datetime.now(timezone.utc))
    if before is not None and before.timestamp >= state.timestamp:
        # The hosts' clocks may differ, and what is older than the last state is not recorded.
        state.timestamp = before.timestamp + timedelta(microseconds=1)
    state.state_details = StateDetails(
        task_run_id=known.id, flow_run_id=known.flow_run_id, scheduled_time=state.state_details.scheduled_time
    )
    if before is not None and before.is_running():
        known.total_run_time += state.timestamp - before.timestamp
    known.end_time = None
    emit_task_run_state_change_event(task_run=known, initial_state=before, validated_state=state)
    known.state = state
    known.state_id, known.state_type, known.state_name = state.id, state.type, state.name
    return known
