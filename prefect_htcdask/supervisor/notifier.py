"""What the supervisor tells the flow's process of its decisions, and of its difficulties: of these each once, however
many rounds they last.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import Any

from prefect_htcdask.condor.job_events import JobRecord
from prefect_htcdask.condor.schedd import ScheddError
from prefect_htcdask.supervisor.policy import Decision
from prefect_htcdask.supervisor.worker_group import WorkerGroup

UNHEARD = 20.0
"""Seconds without an answer of the scheduler after which the user is told."""

CLOCKS_APART = 30.0
"""Seconds between the clocks of two hosts after which the user is told."""

_FIRST_DISTANCE = 60.0
_LONGEST_DISTANCE = 3600.0

_SILENT = "the scheduler is silent"
_CLOCKS = "the clocks are apart"

logger = logging.getLogger(__name__)


class Notifier:
    """Says what the user should know.

    Args:
        say: sends a message to the flow's process.
        why_it_ended: why a job is held or no more, in words.
        several: whether there are several worker groups, so that each is named.
    """

    def __init__(self, say: Callable[[dict[str, Any]], None], why_it_ended: Callable[[JobRecord], str], several: bool):
        self._say = say
        self._why_it_ended = why_it_ended
        self._several = several
        self._told: set[str] = set()
        self._again: dict[str, tuple[float, float]] = {}

    def decided(self, group: WorkerGroup, decision: Decision, submitted: int) -> None:
        """Say what was decided for a group, if it changes anything: the schedd may have taken no jobs."""
        removed = len(decision.remove_pending) + len(decision.retire)
        if submitted or removed:
            self._say(
                {
                    "kind": "decision",
                    "group": group.name,
                    "target": decision.target,
                    "submit": submitted,
                    "remove": removed,
                    "text": decision.reason,
                }
            )

    def tell_once(self, level: str, text: str, key: str | None = None) -> None:
        """Say something to the flow run's log, once for each different text, or `key` where one is given."""
        if (key or text) not in self._told:
            self._told.add(key or text)
            self._say({"kind": "log", "level": level, "text": text})

    def tell_again(self, level: str, text: str, key: str) -> None:
        """Say something that lasts: at once, and again at growing distances as long as it is the case.

        Args:
            level: of the log.
            text: what is said.
            key: what is the same though its numbers change.
        """
        now, same = time.monotonic(), re.sub(r"\d+", "#", key)
        due, distance = self._again.get(same, (0.0, _FIRST_DISTANCE))
        if now >= due:
            self._again[same] = now + distance, min(2 * distance, _LONGEST_DISTANCE)
            self._say({"kind": "log", "level": level, "text": text})

    def tell_failure(self, exc: Exception) -> None:
        """Say that a part of a round failed; the next round does it again."""
        if isinstance(exc, ScheddError):
            self.tell_once("warning", f"{exc}; trying again")
            return
        logger.error("a part of a round failed; the next one goes on", exc_info=exc)
        what = f"{type(exc).__name__}: {exc}"
        self.tell_once("error", f"the supervisor failed to look after the workers, and tries again: {what}", key=what)

    def scheduler_silent(self, silence: float, limit: float) -> None:
        """Say that the scheduler has not answered for a while, once for each time that it falls silent.

        Args:
            silence: seconds since its last answer.
            limit: seconds after which it is given up.
        """
        if silence > UNHEARD:
            self.tell_once(
                "warning",
                f"nothing was heard of the Dask scheduler for {silence:.0f} s, and the gateway does not say that its "
                f"cluster is over: the flow run waits for it, until lease.scheduler = {limit:g} s are over",
                key=_SILENT,
            )

    def heard(self) -> None:
        """The scheduler has answered: its next silence is told anew."""
        self._told.discard(_SILENT)

    def saw_clock(self, ahead: float) -> None:
        """Say that the schedd's clock is `ahead` seconds ahead of ours (negative: behind), if that is worth a word."""
        if abs(ahead) > CLOCKS_APART:
            here = time.time()
            there = here + ahead
            self.tell_once(
                "warning",
                f"the clock of the schedd's host is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this "
                f"host's (there {_utc(there)}, here {_utc(here)}): leases follow the schedd's; let both hosts take "
                "their time from NTP",
                key=_CLOCKS,
            )

    def fail(self, group: WorkerGroup, text: str) -> None:
        """Say that workers of a group cannot be had: the flow must fail rather than wait for ever."""
        if not group.gave_up:
            group.gave_up = True
            self._say({"kind": "failed", "text": self._named(group, text)})

    def give_up(self, group: WorkerGroup, why: str) -> None:
        """The failure budget is spent: say so, with what became of the last."""
        if not group.gave_up:
            self.fail(group, self._with_the_last(group, why))

    def give_up_waiting(self, group: WorkerGroup, why: str) -> None:
        """No worker of a group came within its start timeout."""
        setting = f"{group.settings}.start_timeout = {group.plan.start_timeout:g} s"
        self.fail(group, f"no worker started within {setting}: {why}")

    def warn_degraded(self, group: WorkerGroup, why: str) -> None:
        """The failure budget is spent, but workers that have joined go on: say so once for the last failure."""
        key = f"{group.name} goes on after {group.last_failure}"
        if key not in self._told:
            self.tell_once("warning", self._named(group, self._with_the_last(group, why)), key)

    def _with_the_last(self, group: WorkerGroup, text: str) -> str:
        record = group.last_failed
        if record is None:
            return text
        where = f" on {record.host}" if record.host else ""
        return f"{text}. The last, HTCondor job {record.job_id}{where}: {self._why_it_ended(record)}"

    def _named(self, group: WorkerGroup, text: str) -> str:
        return f"worker group {group.name}: {text}" if self._several else text


def _utc(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(when))
