"""What the workers of a cluster cost and what that was for: pure functions of the jobs and what the scheduler told."""

from __future__ import annotations

import heapq
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prefect_htcdask.condor.diagnosis import diagnose_hold
from prefect_htcdask.condor.job_events import JobChange, JobRecord, JobState
from prefect_htcdask.condor.submit_description import MIB, WorkerSpec
from prefect_htcdask.supervisor.worker_table import WorkerTable, run_seconds, submission_order

REASON_LENGTH = 300
"""Characters of a reason that one row of the table of jobs shows at most."""


class JobUsage:
    """What is known of jobs only as it happens, for as many jobs as the job table has.

    Attributes:
        waits: seconds from each job's submission to its first start.
        holds: why each job was held the last time; such jobs are removed, with another reason, at once.
        evictions: how often each job lost its slot without having been told to leave.
    """

    def __init__(self) -> None:
        self.waits: dict[str, float] = {}
        self.holds: dict[str, str] = {}
        self.evictions: Counter[str] = Counter()

    def take(self, changes: Iterable[JobChange], worker_table: WorkerTable) -> None:
        """Take in changes, in the order in which they happened."""
        for change in changes:
            record = worker_table.table.records[change.job_id]
            if change.what == "held":
                self.holds[change.job_id] = change.reason
            # A removal that we asked for shows as an eviction first.
            elif change.what == "evicted" and change.job_id not in worker_table.leaving:
                self.evictions[change.job_id] += 1
            # Several starts between two looks are rare, and then the last is the best that is known.
            if change.what == "started" and change.job_id not in self.waits and record.submitted and record.last_start:
                self.waits[change.job_id] = max(0.0, record.last_start - record.submitted)


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest of the values that so great a share of them does not exceed; `None` of no values."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else None


def group_usage(
    worker_table: WorkerTable,
    usage: JobUsage,
    group: str,
    spec: WorkerSpec,
    boots: Sequence[float],
    done: int,
    spent: float,
    now: float,
) -> dict[str, Any]:
    """What the workers of one group cost, and what that was for.

    Args:
        worker_table: the jobs and workers.
        usage: what was known of them as it happened.
        group: the worker group.
        spec: what one of its workers is.
        boots: seconds that its latest workers took from their job's start until they joined.
        done: its tasks that ended.
        spent: seconds that these took.
        now: Unix time in seconds.
    """
    records = [record for record in worker_table.table.records.values() if worker_table.group_of(record) == group]
    waits = [wait for record in records if (wait := usage.waits.get(record.job_id)) is not None]
    memory = [record.memory_mib for record in records if record.memory_mib]
    seconds = sum(run_seconds(record, now) for record in records)
    return {
        "cpus": spec.cpus,
        "threads": spec.threads,
        "memory_mib": spec.memory / MIB,
        "jobs": len(records),
        "started": sum(1 for record in records if record.starts),
        "evictions": sum(usage.evictions[record.job_id] for record in records),
        "holds": sum(record.holds for record in records),
        "worker_seconds": seconds,
        "done": done,
        "task_seconds": spent,
        "wait_median": statistics.median(waits) if waits else None,
        "wait_p95": percentile(waits, 0.95),
        "boot_median": statistics.median(boots) if boots else None,
        "peak_memory_mib": max(memory, default=None),
        "peak": worker_table.peaks.get(group, 0) if len(worker_table.groups) > 1 else worker_table.peak,
    }


def job_states(worker_table: WorkerTable) -> dict[str, int]:
    """How many jobs are in each state."""
    return dict(Counter(record.state.value for record in worker_table.table.records.values()))


def job_rows(
    worker_table: WorkerTable, usage: JobUsage, specs: Mapping[str, WorkerSpec], most: int, now: float
) -> list[dict[str, Any]]:
    """The most telling jobs, at most so many: what went wrong first, then what runs, what ended and what waits; of each
    the newest first.

    Args:
        worker_table: the jobs.
        usage: what was known of them as it happened.
        specs: what one worker of each group is.
        most: rows at most.
        now: Unix time in seconds.
    """

    def telling(record: JobRecord) -> tuple[int, tuple[int, int]]:
        if record.job_id in usage.holds or record.exit_code or record.exit_signal is not None:
            rank = 4
        elif usage.evictions[record.job_id]:
            rank = 3
        else:
            rank = {JobState.RUNNING: 2, JobState.EXITED: 1, JobState.REMOVED: 1 if record.starts else -1}.get(
                record.state, 0
            )
        return rank, submission_order(record)

    chosen = heapq.nlargest(most, worker_table.table.records.values(), key=telling)
    return [_row(record, worker_table, usage, specs, now) for record in chosen]


def _row(
    record: JobRecord, worker_table: WorkerTable, usage: JobUsage, specs: Mapping[str, WorkerSpec], now: float
) -> dict[str, Any]:
    group = worker_table.group_of(record)
    spec = specs[group]
    return {
        "id": record.job_id,
        "group": group,
        "state": record.state.value,
        "host": record.host,
        "submitted": record.submitted or None,
        "start": record.last_start,
        "end": record.ended,
        "reason": _reason(record, usage, leaving=record.job_id in worker_table.leaving)[:REASON_LENGTH],
        "core_hours": run_seconds(record, now) * spec.cpus / 3600,
        "memory_mib": record.memory_mib,
        "request_mib": spec.memory / MIB,
    }


def _reason(record: JobRecord, usage: JobUsage, leaving: bool) -> str:
    """Why a job was held, or did not end as it should; empty where all is well."""
    if record.job_id in usage.holds:
        return str(diagnose_hold(record.hold_code, record.hold_subcode, usage.holds[record.job_id]))
    if record.exit_signal is not None:
        return f"killed by signal {record.exit_signal}"
    if record.exit_code:
        return f"ended with exit status {record.exit_code}"
    if record.state is JobState.REMOVED and not leaving:
        return f"removed: {record.reason}"
    if times := usage.evictions[record.job_id]:
        return "evicted once" if times == 1 else f"evicted {times} times"
    return ""
