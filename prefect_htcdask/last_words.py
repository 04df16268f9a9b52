"""Task runs whose last word may have been lost: their worker vanished soon after they ended.

A worker sends Prefect's events within seconds; one that is killed takes with it what is still queued. Then a task run
whose result has long been used would stay Running for ever.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING
from uuid import UUID

from prefect_htcdask.task_run_states import Ended, without_data

if TYPE_CHECKING:
    from typing import Any

    from prefect_htcdask.futures import HTCDaskFuture

WITHIN = 30.0
"""Seconds after a task run's end in which its worker may not have sent off its events."""

REMEMBERED = 5_000
"""Task runs of the last seconds that are looked at when a worker is lost, at most."""


class LastWords:
    """Remembers which task runs ended lately, and which of them may have been cut off by the loss of a worker."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recent: OrderedDict[UUID, tuple[float, Ended]] = OrderedDict()
        self._unsure: dict[UUID, Ended] = {}

    def ended(self, futures: Iterable[HTCDaskFuture[Any]]) -> None:
        """Take futures whose task runs have ended; a second time, when their final states are known."""
        now = time.monotonic()
        with self._lock:
            for future in futures:
                state = future._final_state
                if state is None and (
                    future._task_run_id in self._recent or future.wrapped_future.status != "finished"
                ):
                    continue
                light = without_data(state) if state is not None else None
                ended = Ended(future._task_run_id, future.task_name, future.task, light)
                if future._task_run_id in self._unsure:
                    self._unsure[future._task_run_id] = ended
                self._recent[future._task_run_id] = (now, ended)
                self._recent.move_to_end(future._task_run_id)
            while len(self._recent) > REMEMBERED:
                self._recent.popitem(last=False)

    def worker_lost(self) -> None:
        """A worker has vanished: which task runs it had is not known, so all that ended lately are unsure."""
        since = time.monotonic() - WITHIN
        with self._lock:
            self._unsure.update((one.task_run_id, one) for when, one in self._recent.values() if when >= since)

    def unsure(self) -> list[Ended]:
        """Those of whose end the Prefect API may not have heard."""
        with self._lock:
            return list(self._unsure.values())
