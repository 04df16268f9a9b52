"""What the worker jobs tell: one line in the flow run's log for all jobs that share a fate, and why workers ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..condor.diagnosis import diagnose_exit, diagnose_hold, diagnose_waiting
from ..condor.job_events import JobChange, JobRecord, JobState
from ..condor.staging import RunDirectory
from .fleet import HELD_BY_USER, Fleet
from .group import Group


class JobNews:
    """Takes in what happens to the jobs, and says it.

    Args:
        fleet: the jobs and workers.
        groups: the worker groups, which learn from it.
        directory: where the workers' stderr comes back to.
        say: sends a message to the flow's process.
    """

    def __init__(
        self,
        fleet: Fleet,
        groups: Mapping[str, Group],
        directory: RunDirectory,
        say: Callable[[dict[str, Any]], None],
    ) -> None:
        self._fleet = fleet
        self._groups = groups
        self._directory = directory
        self._say = say

    def take(self, changes: Iterable[JobChange]) -> list[str]:
        """Take in changes and say them; returns the ids of jobs held by HTCondor, which are of no use any more."""
        fates: dict[tuple[str, str], list[str]] = {}
        held = []
        for change in changes:
            fate = self._take_one(change)
            if fate is not None:
                fates.setdefault(fate, []).append(change.job_id)
            if change.what == "held" and self._fleet.table.records[change.job_id].hold_code != HELD_BY_USER:
                held.append(change.job_id)
        for (level, text), job_ids in fates.items():
            jobs = ", ".join(job_ids[:3]) + (f" and {len(job_ids) - 3} more" if len(job_ids) > 3 else "")
            self._say({"kind": "log", "level": level, "text": f"HTCondor job{'s'[: len(job_ids) > 1]} {jobs} {text}"})
        return held

    def _take_one(self, change: JobChange) -> tuple[str, str] | None:
        """Take in one job's change; returns level and words for the flow run's log, or `None` for nothing to say."""
        failed_start = self._fleet.saw_change(change)
        record = self._fleet.table.records[change.job_id]
        died = change.what == "exited" and bool(record.exit_code or record.exit_signal is not None)
        reason = self.why_it_ended(record) if died or change.what == "held" else change.reason
        self._say({"kind": "job", "what": change.what, "job": change.job_id, "host": record.host, "reason": reason})
        group = self._groups[self._fleet.group_of(record)]
        if change.what == "started":
            group.started(record)
        if failed_start:
            group.failed(record, time.monotonic())
        if change.what == "held":
            return "error", f"held: {self.why_it_ended(record)}"
        if change.job_id in self._fleet.leaving:
            return None
        if change.what == "exited" and (record.exit_code or record.exit_signal is not None or failed_start):
            return "warning", f"ended on {record.host}: {self.why_it_ended(record)}"
        if change.what == "removed":
            return "warning", self.why_it_ended(record)
        if change.what == "evicted":
            return "info", f"evicted from {record.host}: {change.reason}"
        return None

    def why_it_ended(self, record: JobRecord) -> str:
        """Why a job is held or no more, in words."""
        if record.state is JobState.HELD:
            return str(diagnose_hold(record.hold_code, record.hold_subcode, record.reason))
        if record.state is JobState.REMOVED:
            return f"removed: {record.reason}"
        return str(diagnose_exit(record.exit_code, record.exit_signal, self._directory.stderr_tail(record.job_id)))


def unmatched(wish: str, count: int, groups: Iterable[Group]) -> str:
    """That tasks ask for what no worker of any group offers, as `kinds.Kinds.unserved` puts it."""
    tasks = f"{count} waiting task{'s'[: count > 1]}"
    name, _, address = wish.partition("=")
    if name == "worker" and "://" in address:
        return (
            f"{tasks} may run on the worker at {address} only, which is not there: submit without workers=..., or with "
            "allow_other_workers=True"
        )
    offers = "; ".join(
        f"{group.name}: {', '.join(f'{name}={amount:g}' for name, amount in group.spec.resources.items()) or '-'}"
        for group in groups
    )
    return (
        f"{tasks} asked for {wish}, which no worker group offers ({offers}): ask for "
        "less, or have a group offer it (worker.gpus, worker.resources, workers)"
    )


def why_none_joined(fleet: Fleet, group: Group, slots: Sequence[Mapping[str, Any]]) -> str:
    """Why no worker of a group has come, as far as jobs and slots tell."""
    jobs = [record for record in fleet.table.records.values() if fleet.group_of(record) == group.name]
    running = sum(1 for record in jobs if record.state is JobState.RUNNING)
    if running:
        jobs_run = "1 worker job runs" if running == 1 else f"{running} worker jobs run"
        return f"{jobs_run}, but none joined the scheduler: can they reach the gateway's proxy?"
    waiting = sum(1 for record in jobs if record.state is JobState.IDLE)
    spec = group.spec
    return str(
        diagnose_waiting(
            slots, cpus=spec.cpus, memory=spec.memory, gpus=spec.gpus, waiting=waiting, settings=group.settings
        )
    )
