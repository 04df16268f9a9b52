"""What is settled with the Prefect API as a flow run ends: each of its task runs has its true final state there.

Where all went well, that is one request, which finds nothing to do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from prefect.client.schemas.objects import StateType

from prefect_htcdask.last_words import LastWords
from prefect_htcdask.task_run_states import Ended, StateReporter

PATIENCE = 60.0
"""Seconds for which an API that is away is asked again: so long Prefect's own engine tries to tell of a flow's end."""

HURRIED = 10.0
"""The same, where the flow was interrupted or cancelled: whoever did that waits for the process's end."""

AGE = 15.0
"""Seconds after which a task run's end, told by a worker that lives on, should have arrived."""

_RETRY = 3.0


@dataclass(frozen=True)
class CutShort:
    """Task runs that the flow run's end cut short, the type of state that they get, and why, for the state."""

    task_run_ids: frozenset[UUID]
    kind: StateType
    why: str


@dataclass(frozen=True)
class FinalAccount:
    """Settles the task runs of one live run.

    Args:
        reporter: tells the API.
        last_words: how task runs ended.
        log: writes to the flow run's log; level and text.
        workers_gone: whether the run's workers have left by then: what they had to tell, they have told.
    """

    reporter: StateReporter
    last_words: LastWords
    log: Callable[[str, str], None]
    workers_gone: bool

    def settle(self, cut_short: CutShort, hurried: bool = False) -> None:
        """Settle now; where the API is away, go on in a thread for which the process waits.

        Args:
            cut_short: what else has to be told.
            hurried: whether the API is asked again for `HURRIED` seconds only, not for `PATIENCE`.
        """
        deadline = time.monotonic() + (HURRIED if hurried else PATIENCE)
        try:
            self._settle(cut_short, self.reporter.close(HURRIED / 2 if hurried else HURRIED), events=True)
        except Exception as exc:
            self.log("info", f"Prefect does not answer, task runs are settled with it when it does: {exc}")
            threading.Thread(target=self._go_on, args=(cut_short, deadline), name="htcdask-account").start()

    def cut(self, cut_short: CutShort) -> None:
        """Tell of task runs that were cut short; quiet where the API does not answer."""
        try:
            self._cut(cut_short)
        except Exception as exc:
            self.log("warning", f"Task runs that were cut short could not be given a final state yet: {exc}")

    def _go_on(self, cut_short: CutShort, deadline: float) -> None:
        while True:
            time.sleep(_RETRY)
            try:
                # The interpreter may be ending, and Prefect takes no more events then.
                return self._settle(cut_short, self.reporter.close(), events=False)
            except Exception as exc:
                if time.monotonic() >= deadline:
                    return self._give_up(exc)

    def _give_up(self, exc: Exception) -> None:
        self.log(
            "warning",
            f"Prefect may not know how task runs ended ({type(exc).__name__}: {exc}); `prefect-htcdask sweep` "
            "ends those that it has for unfinished",
        )

    def _settle(self, cut_short: CutShort, untold: list[Ended], events: bool) -> None:
        self._cut(cut_short)
        self.reporter.confirm([*self.last_words.unsure(), *untold], events=events)
        unfinished = self.reporter.unfinished()
        ended = self.last_words.how(unfinished, before=0.0 if self.workers_gone else AGE)
        if self.reporter.confirm(ended, settle=2.0 if self.workers_gone else 0.0, events=events):
            # Workers could not tell all: then there may be task runs of which the API has not heard at all.
            self.reporter.confirm(self.last_words.latest(), settle=0.0, events=events)

    def _cut(self, cut_short: CutShort) -> None:
        moved = self.reporter.end_unfinished(set(cut_short.task_run_ids), cut_short.kind, cut_short.why)
        if moved:
            self.log("info", f"{moved} task runs were cut short by the end of the flow run")
