"""What the worker jobs tell: one line in the log for all jobs that share an outcome, and why workers ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prefect_htcdask.condor.diagnosis import (
    Diagnosis,
    diagnose_eviction,
    diagnose_exit,
    diagnose_hold,
    diagnose_removal,
)
from prefect_htcdask.condor.job_codes import HoldCode, JobState
from prefect_htcdask.condor.job_events import JobChange, JobRecord
from prefect_htcdask.condor.staging import RunDirectory
from prefect_htcdask.supervisor.job_message import job_message
from prefect_htcdask.supervisor.worker_group import WorkerGroup
from prefect_htcdask.supervisor.worker_table import WorkerTable


class JobEventHandler:
    """Takes in what happens to the jobs, and says it.

    Args:
        worker_table: the jobs and workers.
        groups: the worker groups, which learn from it.
        directory: where the workers' stderr comes back to.
        say: sends a message to the flow's process.
    """

    def __init__(
        self,
        worker_table: WorkerTable,
        groups: Mapping[str, WorkerGroup],
        directory: RunDirectory,
        say: Callable[[dict[str, Any]], None],
    ) -> None:
        self._worker_table = worker_table
        self._groups = groups
        self._directory = directory
        self._say = say

    def take(self, changes: Iterable[JobChange]) -> list[str]:
        """Take in changes and say them; returns the ids of jobs held by HTCondor, which are of no use any more."""
        outcomes: dict[tuple[str, str], list[str]] = {}
        held = []
        for change in changes:
            outcome = self._take_one(change)
            if outcome is not None:
                outcomes.setdefault(outcome, []).append(change.job_id)
            if (
                change.what == "held"
                and self._worker_table.table.records[change.job_id].hold_code != HoldCode.USER_REQUEST
            ):
                held.append(change.job_id)
        for (level, text), job_ids in outcomes.items():
            jobs = ", ".join(job_ids[:3]) + (f" and {len(job_ids) - 3} more" if len(job_ids) > 3 else "")
            self._say({"kind": "log", "level": level, "text": f"HTCondor job{'s'[: len(job_ids) > 1]} {jobs} {text}"})
        return held

    def _take_one(self, change: JobChange) -> tuple[str, str] | None:
        """Take in one job's change; returns level and words for the flow run's log, or `None` for nothing to say."""
        worker = self._worker_table.get(change.job_id)
        failed_start, record = worker.saw_change(change), worker.job
        died = change.what == "exited" and bool(record.exit_code or record.exit_signal is not None or failed_start)
        ended = died or change.what in ("held", "evicted", "removed")
        # HTCondor tells of a removal of ours as of an eviction first.
        asked_for = worker.is_leaving and change.what in ("evicted", "removed")
        diagnosis = self._diagnose_change(change, record) if ended and not asked_for else None
        group = self._groups[self._worker_table.group_of(record)]
        message = job_message(change.what, record, group.name, group.spec, diagnosis, change.reason, asked_for)
        self._say(message)
        if died or change.what == "held":
            self._directory.note_failure(message)
        if change.what == "started":
            group.started(record)
        if failed_start:
            group.failed(record, time.monotonic())
        if diagnosis is None or (worker.is_leaving and change.what != "held"):
            return None
        prefix = {"held": "held: ", "exited": f"ended on {record.host}: "}.get(change.what, "")
        return diagnosis.level, f"{prefix}{diagnosis}"

    def joined(self, record: JobRecord) -> None:
        """Say that a job's worker is at the scheduler."""
        group = self._groups[self._worker_table.group_of(record)]
        self._say(job_message("joined", record, group.name, group.spec))

    def _diagnose_change(self, change: JobChange, record: JobRecord) -> Diagnosis:
        # One look may find several changes of a job: its record is that of the last.
        if change.what == "evicted":
            return diagnose_eviction(record.host, change.reason)
        if change.what == "removed":
            return diagnose_removal(change.reason)
        if change.what == "held":
            return diagnose_hold(record.hold_code, record.hold_subcode, change.reason, self._settings(record))
        return self._diagnose_exit(record)

    def _diagnose_exit(self, record: JobRecord) -> Diagnosis:
        return diagnose_exit(
            record.exit_code,
            record.exit_signal,
            self._directory.stderr_tail(record.job_id),
            joined=self._worker_table.get(record.job_id).has_joined,
            settings=self._settings(record),
        )

    def _settings(self, record: JobRecord) -> str:
        return self._groups[self._worker_table.group_of(record)].settings

    def why_it_ended(self, record: JobRecord) -> str:
        """Why a job is held or no more, in words."""
        if record.state is JobState.HELD:
            return str(diagnose_hold(record.hold_code, record.hold_subcode, record.reason, self._settings(record)))
        if record.state is JobState.REMOVED:
            return str(diagnose_removal(record.reason))
        return str(self._diagnose_exit(record))


def unmatched(wish: str, count: int, groups: Iterable[WorkerGroup]) -> str:
    """That tasks ask for what no worker of any group offers, as `task_kinds.Kinds.unserved` puts it."""
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
