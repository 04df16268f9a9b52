"""How task runs ended, as the flow's process knows it, for those of which the Prefect API may not have heard.

A worker sends Prefect's events within seconds; one that is killed takes with it what is still queued, and so does one
that leaves while the API is away. Then a task run whose result has long been used would stay Running for ever.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from uuid import UUID

from prefect.client.schemas.objects import State, StateType

from prefect_htcdask.runner.futures.compact_state import CompactState
from prefect_htcdask.runner.futures.pending_result import PendingResult
from prefect_htcdask.runner.states.reporter import Ended

if TYPE_CHECKING:
    from prefect.tasks import Task

WITHIN = 30.0
"""Seconds after a task run's end in which its worker may not have sent off its events."""

REMEMBERED = 5_000
"""Task runs, the latest, of which all is remembered; of earlier ones, the kind of their final state."""

_Kind: TypeAlias = "tuple[StateType, str] | None"


class _End(NamedTuple):
    """How a task run ended, as it is remembered; `when` is the time of `time.monotonic` at which it was heard of."""

    when: float
    task_run_id: UUID
    name: str
    task: Task[Any, Any] | None
    state: CompactState | None

    def told(self) -> Ended:
        return Ended(self.task_run_id, self.name, self.task, self.state.state if self.state is not None else None)


class EndedTaskRuns:
    """Remembers how task runs ended, and which of them may have been cut off by the loss of a worker.

    The latest are held whole, but for their results; of all others type and name of the final state, where it is known.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recent: OrderedDict[UUID, _End] = OrderedDict()
        self._unsure: dict[UUID, _End] = {}
        self._earlier: dict[UUID, _Kind] = {}
        self._kinds: dict[_Kind, _Kind] = {}

    def ended(self, results: Iterable[PendingResult]) -> None:
        """Take task runs that have ended; a second time, when their final states are known."""
        now = time.monotonic()
        with self._lock:
            for result in results:
                task_run_id, state = result.task_run_id, result.packed
                if state is None and (task_run_id in self._recent or result.dask_future.status != "finished"):
                    continue
                # One that was cancelled before it started has no record with the API, and needs none.
                task = result.task if state is None or state.type is not StateType.CANCELLED else None
                light = state.without_data() if state is not None else None
                ended = _End(now, task_run_id, result.task_name, task, light)
                if task_run_id in self._unsure:
                    self._unsure[task_run_id] = ended
                self._recent[task_run_id] = ended
                self._recent.move_to_end(task_run_id)
            while len(self._recent) > REMEMBERED:
                task_run_id, ended = self._recent.popitem(last=False)
                kind = (ended.state.type, ended.state.name) if ended.state is not None else None
                self._earlier[task_run_id] = self._kinds.setdefault(kind, kind)

    def worker_lost(self) -> None:
        """A worker has vanished: which task runs it had is not known, so all that ended lately are unsure."""
        since = time.monotonic() - WITHIN
        with self._lock:
            self._unsure.update((one.task_run_id, one) for one in self._recent.values() if one.when >= since)

    def possibly_unreported(self) -> list[Ended]:
        """Those of whose end the Prefect API may not have heard."""
        with self._lock:
            unsure = list(self._unsure.values())
        return [one.told() for one in unsure]

    def latest(self) -> list[Ended]:
        """All that is remembered whole."""
        with self._lock:
            latest = list(self._recent.values())
        return [one.told() for one in latest]

    def lookup(self, task_run_ids: Iterable[UUID], before: float = 0.0) -> list[Ended]:
        """How those of these task runs ended that have.

        Args:
            task_run_ids: task runs, of this flow run or not.
            before: seconds that the end must lie back.
        """
        until = time.monotonic() - before
        with self._lock:
            found: list[Ended] = []
            for task_run_id in task_run_ids:
                if task_run_id in self._recent:
                    if self._recent[task_run_id].when <= until:
                        found.append(self._recent[task_run_id].told())
                elif task_run_id in self._earlier:
                    kind = self._earlier[task_run_id]
                    state: State[Any] | None = State(type=kind[0], name=kind[1]) if kind is not None else None
                    found.append(Ended(task_run_id, "", None, state))
            return found
