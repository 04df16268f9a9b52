"""What the workers of a cluster cost and what that was for: pure functions of the jobs and what the scheduler told."""

from __future__ import annotations

import heapq
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from prefect_htcdask.condor.diagnosis import diagnose_hold
from prefect_htcdask.condor.job_codes import JobState
from prefect_htcdask.condor.submit_description import MIB, WorkerSpec
from prefect_htcdask.supervisor.worker_table import Worker, WorkerTable, run_seconds, submission_order

REASON_LENGTH = 300
"""Characters of a reason that one row of the table of jobs shows at most."""


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest of the values that so great a share of them does not exceed; `None` of no values."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else None


def group_usage(
    worker_table: WorkerTable,
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
        group: the worker group.
        spec: what one of its workers is.
        boots: seconds that its latest workers took from their job's start until they joined.
        done: its tasks that ended.
        spent: seconds that these took.
        now: Unix time in seconds.
    """
    workers = worker_table.workers(group)
    records = [worker.job for worker in workers]
    waits = [worker.wait for worker in workers if worker.wait is not None]
    memory = [record.memory_mib for record in records if record.memory_mib]
    seconds = sum(run_seconds(record, now) for record in records)
    return {
        "cpus": spec.cpus,
        "threads": spec.threads,
        "memory_mib": spec.memory / MIB,
        "jobs": len(records),
        "started": sum(1 for record in records if record.starts),
        "evictions": sum(worker.evictions for worker in workers),
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


def job_rows(worker_table: WorkerTable, specs: Mapping[str, WorkerSpec], most: int, now: float) -> list[dict[str, Any]]:
    """The most telling jobs, at most so many: what went wrong first, then what runs, what ended and what waits; of each
    the newest first.

    Args:
        worker_table: the jobs.
        specs: what one worker of each group is.
        most: rows at most.
        now: Unix time in seconds.
    """
    chosen = heapq.nlargest(most, worker_table.workers(), key=_telling)
    return [_row(worker, worker_table.group_of(worker.job), specs, now) for worker in chosen]


def _telling(worker: Worker) -> tuple[int, tuple[int, int]]:
    job = worker.job
    if worker.hold_reason is not None or job.exit_code or job.exit_signal is not None:
        rank = 4
    elif worker.evictions:
        rank = 3
    else:
        rank = {JobState.RUNNING: 2, JobState.EXITED: 1, JobState.REMOVED: 1 if job.starts else -1}.get(job.state, 0)
    return rank, submission_order(job)


def _row(worker: Worker, group: str, specs: Mapping[str, WorkerSpec], now: float) -> dict[str, Any]:
    job, spec = worker.job, specs[group]
    return {
        "id": job.job_id,
        "group": group,
        "state": job.state.value,
        "host": job.host,
        "submitted": job.submitted or None,
        "start": job.last_start,
        "end": job.ended,
        "reason": _reason(worker)[:REASON_LENGTH],
        "core_hours": run_seconds(job, now) * spec.cpus / 3600,
        "memory_mib": job.memory_mib,
        "request_mib": spec.memory / MIB,
    }


def _reason(worker: Worker) -> str:
    """Why a job was held, or did not end as it should; empty where all is well."""
    job = worker.job
    if worker.hold_reason is not None:
        return str(diagnose_hold(job.hold_code, job.hold_subcode, worker.hold_reason))
    if job.exit_signal is not None:
        return f"killed by signal {job.exit_signal}"
    if job.exit_code:
        return f"ended with exit status {job.exit_code}"
    if job.state is JobState.REMOVED and not worker.is_leaving:
        return f"removed: {job.reason}"
    if worker.evictions:
        return "evicted once" if worker.evictions == 1 else f"evicted {worker.evictions} times"
    return ""
