"""What is settled with the Prefect API as a flow run ends: each of its task runs has its true final state there.

Where all went well, that is one request, which finds nothing to do.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from uuid import UUID

from prefect.client.schemas.objects import StateType

from prefect_htcdask.runner.states.ended_task_runs import EndedTaskRuns
from prefect_htcdask.runner.states.reporter import Ended, Started, StateReporter

PATIENCE = 60.0
"""Seconds for which an API that is away is asked again: so long Prefect's own engine tries to tell of a flow's end."""

INTERRUPTED_TIMEOUT = 10.0
"""The same, where the flow was interrupted or cancelled: whoever did that waits for the process's end."""

AGE = 15.0
"""Seconds after which a task run's end, told by a worker that lives on, should have arrived."""

_RETRY = 3.0

# Not the flow run's own, where the API is away: a process waits for a minute at its end for each batch of such lines.
logger = logging.getLogger("prefect.task_runner.htcdask")


@dataclass(frozen=True)
class InterruptedTaskRuns:
    """Task runs that the flow run's end cut short.

    Args:
        task_run_ids: of task runs that had not ended.
        kind: the type of state that they get.
        why: for the state.
        interrupted: whether the flow was interrupted. Then Prefect may have had it cancelled, and time is short.
        started: those of them that had started.
    """

    task_run_ids: frozenset[UUID]
    kind: StateType
    why: str
    interrupted: bool = False
    started: tuple[Started, ...] = ()


@dataclass(frozen=True)
class StateReconciler:
    """Settles the task runs of one live run.

    Args:
        reporter: tells the API.
        ended_task_runs: how task runs ended.
        log: writes to the flow run's log; level and text.
        workers_gone: whether the run's workers have left by then: what they had to tell, they have told.
    """

    reporter: StateReporter
    ended_task_runs: EndedTaskRuns
    log: Callable[[str, str], None]
    workers_gone: bool

    def reconcile(self, interrupted_runs: InterruptedTaskRuns) -> None:
        """Settle now; where the API is away, go on in a thread for which the process waits."""
        deadline = time.monotonic() + _patience(interrupted_runs.interrupted)
        try:
            self._settle(
                interrupted_runs, self.reporter.close(first_attempt(interrupted_runs.interrupted)), events=True
            )
        except Exception as exc:
            logger.info("Prefect does not answer, task runs are settled with it when it does: %s", exc)
            threading.Thread(target=self._go_on, args=(interrupted_runs, deadline), name="htcdask-account").start()

    def tell_interrupted(self, interrupted_runs: InterruptedTaskRuns) -> None:
        """Tell of task runs that were cut short; quiet where the API does not answer."""
        try:
            self._cut(interrupted_runs)
        except Exception as exc:
            logger.warning("Task runs that were cut short could not be given a final state yet: %s", exc)

    def _go_on(self, interrupted_runs: InterruptedTaskRuns, deadline: float) -> None:
        while True:
            time.sleep(_RETRY)
            try:
                # The interpreter may be ending, and Prefect takes no more events then.
                return self._settle(interrupted_runs, self.reporter.close(0.0), events=False)
            except Exception as exc:
                if time.monotonic() >= deadline:
                    return self._give_up(exc)

    def _give_up(self, exc: Exception) -> None:
        logger.warning(
            "Prefect may not know how task runs ended (%s: %s); `prefect-htcdask sweep` ends those that it has for "
            "unfinished",
            type(exc).__name__,
            exc,
        )

    def _settle(self, interrupted_runs: InterruptedTaskRuns, untold: list[Ended], events: bool) -> None:
        if interrupted_runs.interrupted and interrupted_runs.task_run_ids and self.reporter.is_cancelled():
            interrupted_runs = replace(interrupted_runs, kind=StateType.CANCELLED)
        self._cut(interrupted_runs)
        self.reporter.end_started(interrupted_runs.started, interrupted_runs.kind, interrupted_runs.why, events=events)
        self.reporter.ensure_final_states([*self.ended_task_runs.possibly_unreported(), *untold], events=events)
        unfinished = self.reporter.unfinished()
        ended = self.ended_task_runs.lookup(unfinished, before=0.0 if self.workers_gone else AGE)
        if self.reporter.ensure_final_states(ended, events=events, workers_gone=self.workers_gone):
            # Workers could not tell all: then there may be task runs of which the API has not heard at all.
            latest = self.ended_task_runs.latest()
            self.reporter.ensure_final_states(latest, settle=0.0, events=events, workers_gone=self.workers_gone)

    def _cut(self, interrupted_runs: InterruptedTaskRuns) -> None:
        moved = self.reporter.end_unfinished(
            set(interrupted_runs.task_run_ids), interrupted_runs.kind, interrupted_runs.why
        )
        if moved:
            self.log("info", f"{moved} task runs were cut short by the end of the flow run")


def first_attempt(interrupted: bool) -> float:
    """Seconds for this process's own reports to be sent, before the Prefect API is looked at.

    Args:
        interrupted: whether the flow was interrupted or cancelled.
    """
    return min(_patience(interrupted) / 2, 10.0)


def _patience(interrupted: bool) -> float:
    return INTERRUPTED_TIMEOUT if interrupted else PATIENCE
