"""Task runs that ended without saying so: the Prefect API is told what became of them.

A task run reports its own states from the worker, by events. Where the worker is gone, its last word may have been
Running; then the flow's process speaks for it.
"""

from __future__ import annotations

import contextvars
import logging
import queue
import sys
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, NamedTuple, cast
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    TaskRunFilter,
    TaskRunFilterId,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import State, StateDetails, StateType, TaskRun
from prefect.exceptions import ObjectNotFound
from prefect.tasks import Task
from prefect.types import DateTime
from prefect.utilities.engine import emit_task_run_state_change_event

from prefect_htcdask.runner.futures.compact_state import without_data
from prefect_htcdask.utils.aio import interpreter_ends
from prefect_htcdask.utils.prefect_client import TIMEOUT, open_client

logger = logging.getLogger("prefect.task_runner.htcdask")

UNFINISHED = [
    StateType.SCHEDULED,
    StateType.PENDING,
    StateType.RUNNING,
    StateType.CANCELLING,
]
PAGE = 200

LONGEST_PAUSE = 2.0
"""Seconds between two looks at what has arrived, at most."""

UNCHANGED_PAGES = 2
"""Pages of task runs of which none has ended, after which the others are not asked for: what arrives, arrives in order.
"""

RETRIES = 2
"""Attempts of Prefect's client beyond the first, about 2 s and 4 s later, while the flow runs; what fails then is tried
again at the end."""

AT_MOST = 30.0
"""Seconds in which a backlog of events may arrive, as long as it goes on arriving."""


class Ended(NamedTuple):
    """A task run that has ended.

    Attributes:
        task_run_id: its id.
        name: its task's name.
        task: the task.
        state: its final state where that is known.
        overrules: whether that counts though the API has another final state: of a result that the flow cannot read.
    """

    task_run_id: UUID
    name: str
    task: Task[Any, Any] | None
    state: State[Any] | None
    overrules: bool = False


class Started(NamedTuple):
    """A task run that has started: its id, its task's name, and the task."""

    task_run_id: UUID
    name: str
    task: Task[Any, Any] | None


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
        self._queue: queue.Queue[Ended | None] = queue.Queue()
        self._untold: dict[UUID, Ended] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def report(self, ended: Ended) -> None:
        """Have a task run moved to its state, unless it has reached a final state by itself that is not overruled."""
        with self._lock:
            self._untold[ended.task_run_id] = ended
            self._queue.put(ended)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._context.copy().run, args=(self._work,), name="htcdask-states", daemon=True
                )
                self._thread.start()

    def close(self, timeout: float = 10.0) -> list[Ended]:
        """Wait until all that was reported has been sent, `timeout` seconds at most; returns what could not be."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            self._queue.put(None)
            thread.join(timeout)
        with self._lock:
            return list(self._untold.values())

    def ensure_final_states(
        self, ended: Iterable[Ended], settle: float = 2.0, events: bool = True, workers_gone: bool = True
    ) -> int:
        """Tell the API of those of these task runs that it has in no final state, or not at all.

        Args:
            ended: task runs that have ended.
            settle: seconds in which what is still on its way may arrive; a backlog that goes on arriving is waited for.
            events: whether this process can still send Prefect's events, by which alone a task run of which the API has
                no record can be told of. A process whose interpreter ends cannot.
            workers_gone: whether the workers are; else what is still arriving after `AT_MOST` seconds is late, not
                lost, and left to arrive.

        Returns:
            of how many it was told.
        """
        by_id = {one.task_run_id: one for one in ended}
        return self._context.copy().run(self._confirm, by_id, settle, events, workers_gone) if by_id else 0

    def _confirm(self, ended: dict[UUID, Ended], settle: float, events: bool, workers_gone: bool) -> int:
        with open_client(TIMEOUT) as client:
            known, arriving = self._await_ends(client, ended, settle)
            if arriving and not workers_gone:
                logger.info("The Prefect API has yet to record the ends of %d task runs; they are arriving", len(known))
                return 0
            untold = len(known)
            if events and known:
                for task_run_id, task_run in known.items():
                    self._emit_end(ended[task_run_id], task_run)
                if not arriving:
                    known, arriving = self._await_ends(client, known, max(settle, 2.0))
            if arriving and events:
                return untold  # a request for each would hold the backlog up
            for task_run_id, task_run in known.items():
                if task_run is not None:
                    self._set_state(client, task_run_id, _final(ended[task_run_id]))
        return untold

    def _await_ends(
        self, client: SyncPrefectClient, ids: Iterable[UUID], settle: float
    ) -> tuple[dict[UUID, TaskRun | None], bool]:
        """Wait for final states.

        Returns:
            the task runs that have none, `None` for one that the API does not know; and whether more are arriving.
        """
        since = time.monotonic()
        deadline = since + settle
        # Ids grow with time, and so they arrive.
        missing: dict[UUID, TaskRun | None] = dict.fromkeys(sorted(ids, key=lambda one: one.int))
        before: int | None = None
        while True:
            began = time.monotonic()
            if began < deadline:
                self._look(client, missing, UNCHANGED_PAGES)
            if missing and time.monotonic() >= deadline:
                self._look(client, missing)
            now = time.monotonic()
            arriving = before is not None and len(missing) < before
            if arriving:
                deadline = min(now + settle, since + AT_MOST)
            if not missing or now >= deadline:
                return missing, arriving and bool(missing)
            before = len(missing)
            # The server records what is waited for in the process that is asked.
            time.sleep(min(max(0.25, 2 * (now - began)), LONGEST_PAUSE))

    def _look(
        self, client: SyncPrefectClient, missing: dict[UUID, TaskRun | None], unchanged: int = sys.maxsize
    ) -> None:
        """Take those that have ended out of `missing`; not further than so many pages of which none has."""
        asked = list(missing)
        for start in range(0, len(asked), PAGE):
            before = len(missing)
            some = TaskRunFilter(id=TaskRunFilterId(any_=asked[start : start + PAGE]))
            for task_run in client.read_task_runs(task_run_filter=some, limit=PAGE):
                if task_run.state is not None and task_run.state.is_final():
                    del missing[task_run.id]
                else:
                    missing[task_run.id] = task_run
            unchanged -= len(missing) == before
            if not unchanged:
                return

    def unfinished(self) -> set[UUID]:
        """Those task runs of the flow run that have no final state in the API; none outside a flow."""
        return self._context.copy().run(self._ask_unfinished) if self.flow_run_id is not None else set()

    def _ask_unfinished(self) -> set[UUID]:
        with open_client(TIMEOUT) as client:
            return self._unfinished(client)

    def end_unfinished(self, task_run_ids: set[UUID], state_type: StateType, message: str, settle: float = 2.0) -> int:
        """Give a final state to those of the task runs that the API still holds for unfinished.

        What was cancelled is Cancelled: Prefect's engine says Crashed of a function that was interrupted for it.

        Args:
            task_run_ids: the candidates, which had not ended; others of the flow run are left alone.
            state_type: CRASHED or CANCELLED.
            message: why, for the state.
            settle: seconds in which task runs that just ended may still report so.

        Returns:
            how many task runs were moved.
        """
        if self.flow_run_id is None or not task_run_ids:
            return 0
        return self._context.copy().run(self._end_unfinished, task_run_ids, state_type, message, settle)

    def end_started(
        self, started: Iterable[Started], state_type: StateType, message: str, settle: float = 2.0, events: bool = True
    ) -> int:
        """Give a final state to task runs that have none, though the API may not have heard of their start yet.

        Word of the start that arrives later is older, and changes nothing then.

        Args:
            started: task runs that had started and are to have ended.
            state_type: CRASHED or CANCELLED.
            message: why, for the state.
            settle: as in `ensure_final_states`.
            events: as in `ensure_final_states`.

        Returns:
            of how many the API was told.
        """
        return self.ensure_final_states(
            [Ended(*one, _new_state(state_type, message)) for one in started], settle, events
        )

    def _end_unfinished(self, task_run_ids: set[UUID], state_type: StateType, message: str, settle: float) -> int:
        deadline = time.monotonic() + settle
        with open_client(TIMEOUT) as client:
            while True:
                unfinished = self._unfinished(client) & task_run_ids
                if not unfinished or time.monotonic() >= deadline:
                    break
                time.sleep(0.25)
            if state_type is StateType.CANCELLED:
                unfinished |= self._of_types(client, [StateType.CRASHED]) & task_run_ids
            for task_run_id in unfinished:
                self._set_state(client, task_run_id, _new_state(state_type, message))
        return len(unfinished)

    def _work(self) -> None:
        with open_client(TIMEOUT, RETRIES) as client:
            while (ended := self._queue.get()) is not None:
                try:
                    self._tell(client, ended)
                except Exception as exc:
                    # It is tried again as the flow run ends.
                    logger.info("Task run %s could not be moved to %s yet: %s", ended.task_run_id, ended.state, exc)
                else:
                    with self._lock:
                        self._untold.pop(ended.task_run_id, None)

    def _tell(self, client: SyncPrefectClient, ended: Ended) -> None:
        try:
            known = client.read_task_run(ended.task_run_id)
        except ObjectNotFound:
            # Its worker died before the API heard of it at all.
            self._emit_end(ended, None)
            return
        if ended.overrules or known.state is None or not known.state.is_final():
            self._set_state(client, ended.task_run_id, _final(ended))

    def _set_state(self, client: SyncPrefectClient, task_run_id: UUID, state: State[Any]) -> None:
        sent = without_data(state)
        client.set_task_run_state(task_run_id, sent, force=True)

    def _emit_end(self, ended: Ended, task_run: TaskRun | None) -> None:
        """Tell of an end as its worker would have, at the time at which it was; later word of the worker's is no news.

        Args:
            ended: the task run.
            task_run: what the API knows of it, if anything.
        """
        if interpreter_ends():
            raise RuntimeError("the interpreter ends, and Prefect sends no more events")
        state = _final(ended)
        state.state_details = StateDetails(task_run_id=ended.task_run_id, flow_run_id=self.flow_run_id)
        before = task_run.state if task_run is not None else None
        if before is not None and before.timestamp >= state.timestamp:
            # The hosts' clocks may differ, and what is older than the last state is not recorded.
            state.timestamp = cast(DateTime, before.timestamp + timedelta(microseconds=1))
        if task_run is None:
            if ended.task is None:
                return
            task_run = TaskRun(
                id=ended.task_run_id,
                name=ended.name,
                flow_run_id=self.flow_run_id,
                task_key=ended.task.task_key,
                dynamic_key=str(ended.task_run_id),
                task_version=ended.task.version,
                tags=sorted(ended.task.tags),
                expected_start_time=cast(DateTime, state.timestamp),
            )
        elif before is not None and before.is_running():
            task_run.total_run_time += state.timestamp - before.timestamp
        task_run.end_time = cast(DateTime, state.timestamp)
        task_run.state, task_run.state_type, task_run.state_name = state, state.type, state.name
        emit_task_run_state_change_event(task_run=task_run, initial_state=before, validated_state=state)

    def is_cancelled(self) -> bool:
        """Whether the flow run was cancelled, as far as the API knows; not outside a flow."""
        return self.flow_run_id is not None and self._context.copy().run(self._ask_cancelled, self.flow_run_id)

    def _ask_cancelled(self, flow_run_id: UUID) -> bool:
        with open_client(TIMEOUT) as client:
            state = client.read_flow_run(flow_run_id).state
        return state is not None and (state.is_cancelling() or state.is_cancelled())

    def _unfinished(self, client: SyncPrefectClient) -> set[UUID]:
        return self._of_types(client, UNFINISHED)

    def _of_types(self, client: SyncPrefectClient, types: list[StateType]) -> set[UUID]:
        assert self.flow_run_id is not None
        found: set[UUID] = set()
        while True:
            page = client.read_task_runs(
                flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[self.flow_run_id])),
                task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=types))),
                limit=PAGE,
                offset=len(found),
            )
            found |= {task_run.id for task_run in page}
            if len(page) < PAGE:
                return found


def _new_state(state_type: StateType, message: str) -> State[Any]:
    return State(type=state_type, name=state_type.value.capitalize(), message=message)


def _final(ended: Ended) -> State[Any]:
    """The state to tell of; where it is not known, that."""
    if ended.state is None:
        return _new_state(
            StateType.CRASHED, "How it ended is not known: neither its worker's last word nor its result arrived"
        )
    return without_data(ended.state)
