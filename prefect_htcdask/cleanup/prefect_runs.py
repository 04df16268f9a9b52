"""Flow runs and task runs that nothing can end any more: whose process is gone, or whose flow run is over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType, TaskRun
from prefect.exceptions import ObjectNotFound

from prefect_htcdask.runner.states.reporter import UNFINISHED

_BATCH = 100
_PAGE = 200
_MAX_PAGES = 100

T = TypeVar("T")


def read_flow_runs(client: SyncPrefectClient, ids: Iterable[str]) -> dict[str, FlowRun]:
    """Those of the flow runs that the API knows, by id."""
    found: dict[str, FlowRun] = {}
    for batch in _batches([UUID(text) for text in sorted(set(ids)) if _is_uuid(text)]):
        only = FlowRunFilter(id=FlowRunFilterId(any_=batch))
        found.update({str(run.id): run for run in client.read_flow_runs(flow_run_filter=only, limit=_BATCH)})
    return found


def read_subflow_runs(client: SyncPrefectClient, parents: Iterable[str], states: Sequence[StateType]) -> list[FlowRun]:
    """Subflow runs of flow runs that are in one of some states; a few hundred, the next sweep finds the rest."""
    found = []
    wanted = FlowRunFilterState(type=FlowRunFilterStateType(any_=list(states)))
    for batch in _batches([UUID(text) for text in sorted(set(parents))]):
        only = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=batch), state=wanted)
        found += client.read_flow_runs(flow_run_filter=only, limit=_PAGE)
    return found


def with_parents(client: SyncPrefectClient, flow_runs: Iterable[FlowRun]) -> Iterator[tuple[FlowRun, FlowRun]]:
    """Subflow runs, each with the flow run that it is part of, where the API knows that."""
    for run in flow_runs:
        if run.parent_task_run_id is None:
            continue
        try:
            parent = client.read_task_run(run.parent_task_run_id).flow_run_id
            if parent is not None:
                yield run, client.read_flow_run(parent)
        except ObjectNotFound:
            continue


def unfinished_task_runs(
    client: SyncPrefectClient, flow_run_ids: Iterable[str]
) -> tuple[dict[str, list[TaskRun]], bool]:
    """Task runs of flow runs that have not reached a final state, by flow run.

    Returns:
        the task runs, and whether these are all: a sweep's work is bounded, the next one finds the rest.
    """
    found: dict[str, list[TaskRun]] = {}
    pages = 0
    states = TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=[*UNFINISHED, StateType.PAUSED])))
    for batch in _batches([UUID(text) for text in sorted(set(flow_run_ids))]):
        only = FlowRunFilter(id=FlowRunFilterId(any_=batch))
        offset = 0
        while True:
            if pages == _MAX_PAGES:
                return found, False
            page = client.read_task_runs(flow_run_filter=only, task_run_filter=states, limit=_PAGE, offset=offset)
            pages += 1
            for task_run in page:
                found.setdefault(str(task_run.flow_run_id), []).append(task_run)
            if len(page) < _PAGE:
                break
            offset += _PAGE
    return found, True


def end_task_runs(client: SyncPrefectClient, task_runs: Iterable[TaskRun], message: str) -> int:
    """Move task runs to Crashed, where they have not ended since they were read; returns how many were moved."""
    moved = 0
    for task_run in task_runs:
        try:
            now = client.read_task_run(task_run.id)
            if now.state is not None and now.state.is_final():
                continue
            state: State[None] = State(type=StateType.CRASHED, name="Crashed", message=message)
            client.set_task_run_state(task_run.id, state, force=True)
        except ObjectNotFound:
            continue  # deleted meanwhile
        moved += 1
    return moved


def end_flow_run(client: SyncPrefectClient, seen: FlowRun, message: str) -> State[None] | None:
    """Move a flow run whose process is gone to Crashed, or to Cancelled where that was asked for.

    Args:
        client: the Prefect API.
        seen: the flow run, read at least some seconds ago: a Prefect process that supervises it speaks first.
        message: why, for the state.

    Returns:
        the new state, or `None` where the flow run has another one than had been seen.
    """
    try:
        now = client.read_flow_run(seen.id)
    except ObjectNotFound:
        return None
    if now.state is None or seen.state is None or now.state.id != seen.state.id:
        return None
    kind = StateType.CANCELLED if now.state.is_cancelling() else StateType.CRASHED
    state: State[None] = State(type=kind, name=kind.value.capitalize(), message=message)
    client.set_flow_run_state(seen.id, state, force=True)
    return state


def _batches(items: Sequence[T]) -> Iterator[list[T]]:
    for start in range(0, len(items), _BATCH):
        yield list(items[start : start + _BATCH])


def _is_uuid(text: str) -> bool:
    try:
        UUID(text)
    except ValueError:
        return False
    return True
