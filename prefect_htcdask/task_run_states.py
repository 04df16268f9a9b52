"""Task runs that ended without saying so: the Prefect API is told what became of them.

A task run reports its own states from the worker, by events. Where the worker is gone, its last word may have been
Running; then the flow's process speaks for it.
"""

from __future__ import annotations

import contextvars
import logging
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    TaskRunFilter,
    TaskRunFilterId,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import State, StateDetails, StateType, TaskRun
from prefect.context import SyncClientContext
from prefect.exceptions import ObjectNotFound
from prefect.tasks import Task
from prefect.types import DateTime
from prefect.utilities.engine import emit_task_run_state_change_event

logger = logging.getLogger("prefect.task_runner.htcdask")

UNFINISHED = [
    StateType.SCHEDULED,
    StateType.PENDING,
    StateType.RUNNING,
    StateType.CANCELLING,
]
PAGE = 200


class Ended(NamedTuple):
    """A task run that has ended: its id, its task's name, the task, and its final state where that is known."""

    task_run_id: UUID
    name: str
    task: Task[Any, Any] | None
    state: State[Any] | None


class StateReporter:
    """Moves task runs to final states, in the background, in the context that it is made in.

    Prefect's events take the flow run that they belong to from the context, and where there is none, from the one in
    which this process first sent an event.

    Args:
        flow_run_id: the flow run of the task runs; none outside a flow.
    """

    def __init__(self, flow_run_id: UUID | None) -> None:
        self.flow_run_id = flow_run_id
        self._context = contextvars.copy_context()
        self._queue: queue.Queue[tuple[UUID, str, Task[Any, Any] | None, State[Any]] | None] = queue.Queue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def report(self, task_run_id: UUID, name: str, task: Task[Any, Any] | None, state: State[Any]) -> None:
        """Have a task run moved to `state`, unless it has reached a final state by itself."""
        self._queue.put((task_run_id, name, task, state))
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._context.copy().run, args=(self._work,), name="htcdask-states", daemon=True
                )
                self._thread.start()

    def close(self, timeout: float = 10.0) -> None:
        """Wait until all that was reported has been sent, `timeout` seconds at most."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            self._queue.put(None)
            thread.join(timeout)

    def confirm(self, ended: list[Ended], settle: float = 2.0) -> int:
        """Tell the API of those of these task runs that it has in no final state, or not at all.

        Args:
            ended: task runs that have ended.
            settle: seconds in which what is still on its way may arrive.

        Returns:
            of how many it was told.
        """
        if not ended:
            return 0
        return self._context.copy().run(self._confirm, ended, settle)

    def _confirm(self, ended: list[Ended], settle: float) -> int:
        deadline = time.monotonic() + settle
        unknown = {one.task_run_id: one for one in ended}
        with self._client() as client:
            while True:
                for start in range(0, len(unknown), PAGE):
                    ids = list(unknown)[start : start + PAGE]
                    for task_run in client.read_task_runs(
                        task_run_filter=TaskRunFilter(id=TaskRunFilterId(any_=ids)), limit=PAGE
                    ):
                        if task_run.state is not None and task_run.state.is_final():
                            unknown[task_run.id] = None  # type: ignore[assignment]
                unknown = {task_run_id: one for task_run_id, one in unknown.items() if one is not None}
                if not unknown or time.monotonic() >= deadline:
                    break
                time.sleep(0.25)
            for task_run_id, one in unknown.items():
                state = one.state or _new_state(StateType.CRASHED, "Its worker was lost before it told how it ended")
                self._tell(client, task_run_id, one.name, one.task, state)
        return len(unknown)

    def end_unfinished(self, task_run_ids: set[UUID], state_type: StateType, message: str, settle: float = 2.0) -> int:
        """Give a final state to those of the task runs that the API still holds for unfinished.

        Args:
            task_run_ids: the candidates; others of the flow run are left alone.
            state_type: CRASHED or CANCELLED.
            message: why, for the state.
            settle: seconds in which task runs that just ended may still report so.

        Returns:
            how many task runs were moved.
        """
        if self.flow_run_id is None or not task_run_ids:
            return 0
        return self._context.copy().run(self._end_unfinished, task_run_ids, state_type, message, settle)

    def _end_unfinished(self, task_run_ids: set[UUID], state_type: StateType, message: str, settle: float) -> int:
        deadline = time.monotonic() + settle
        with self._client() as client:
            while True:
                unfinished = self._unfinished(client) & task_run_ids
                if not unfinished or time.monotonic() >= deadline:
                    break
                time.sleep(0.25)
            for task_run_id in unfinished:
                self._set_state(client, task_run_id, _new_state(state_type, message))
        return len(unfinished)

    @contextmanager
    def _client(self) -> Iterator[SyncPrefectClient]:
        # A client of this thread's own: the flow's may be in use, or closed.
        SyncClientContext.__var__.set(cast(Any, None))
        with get_client(sync_client=True) as client:
            yield client

    def _work(self) -> None:
        with self._client() as client:
            while (item := self._queue.get()) is not None:
                task_run_id, name, task, state = item
                try:
                    self._tell(client, task_run_id, name, task, state)
                except Exception:
                    logger.warning("Could not move task run %s to %s", task_run_id, state.name, exc_info=True)

    def _tell(
        self, client: SyncPrefectClient, task_run_id: UUID, name: str, task: Task[Any, Any] | None, state: State[Any]
    ) -> None:
        try:
            known = client.read_task_run(task_run_id)
        except ObjectNotFound:
            # Its worker died before the API heard of it at all.
            if task is not None:
                self._create(task_run_id, name, task, state)
            return
        if known.state is None or not known.state.is_final():
            self._set_state(client, task_run_id, state)

    def _set_state(self, client: SyncPrefectClient, task_run_id: UUID, state: State[Any]) -> None:
        sent = without_data(state)
        client.set_task_run_state(task_run_id, sent, force=True)

    def _create(self, task_run_id: UUID, name: str, task: Task[Any, Any], state: State[Any]) -> None:
        sent = without_data(state)
        sent.state_details = StateDetails(task_run_id=task_run_id, flow_run_id=self.flow_run_id)
        emit_task_run_state_change_event(
            task_run=TaskRun(
                id=task_run_id,
                name=name,
                flow_run_id=self.flow_run_id,
                task_key=task.task_key,
                dynamic_key=str(task_run_id),
                task_version=task.version,
                tags=sorted(task.tags),
                expected_start_time=cast(DateTime, sent.timestamp),
                end_time=cast(DateTime, sent.timestamp),
                state=sent,
                state_type=sent.type,
                state_name=sent.name,
            ),
            initial_state=None,
            validated_state=sent,
        )

    def _unfinished(self, client: SyncPrefectClient) -> set[UUID]:
        assert self.flow_run_id is not None
        found: set[UUID] = set()
        while True:
            page = client.read_task_runs(
                flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[self.flow_run_id])),
                task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=UNFINISHED))),
                limit=PAGE,
                offset=len(found),
            )
            found |= {task_run.id for task_run in page}
            if len(page) < PAGE:
                return found


def _new_state(state_type: StateType, message: str) -> State[Any]:
    return State(type=state_type, name=state_type.value.capitalize(), message=message)


def without_data(state: State[Any]) -> State[Any]:
    # Not by model_copy, which resets the timestamp of a state.
    return State(type=state.type, name=state.name, message=state.message, timestamp=state.timestamp)
