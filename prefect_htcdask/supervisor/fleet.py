"""The workers of a cluster as the supervisor sees them: HTCondor jobs on one side, Dask workers on the other.

Pure bookkeeping: the loop feeds it job changes and the scheduler's answers, and asks it for the supply.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..condor.job_events import JobChange, JobRecord, JobState, JobTable
from ..condor.worker_job import job_of_worker
from ..scaling.policy import Supply


@dataclass
class Fleet:
    """Jobs and workers of one cluster.

    Attributes:
        table: all jobs known.
        joined: names of workers at the scheduler now, by job id.
        names: the last name of each job's worker, also of those that left.
        ever_joined: ids of jobs whose worker was at the scheduler at some time.
        leaving: ids of jobs that were told to go, by removal or retirement.
        failures: workers in a row that ended before they joined.
        last_failure: when the last of them did, on the monotonic clock.
    """

    table: JobTable = field(default_factory=JobTable)
    joined: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    ever_joined: set[str] = field(default_factory=set)
    leaving: set[str] = field(default_factory=set)
    failures: int = 0
    last_failure: float | None = None
    peak: int = 0
    evictions: int = 0
    holds: int = 0

    def submitted_jobs(self, job_ids: Iterable[str], group: str, now: float) -> None:
        """Take in jobs that were just submitted, before the event log tells of them."""
        for job_id in job_ids:
            record = self.table.get(job_id)
            record.group, record.submitted = group, now

    def saw_workers(self, names: Iterable[str]) -> list[str]:
        """Take in the workers that the scheduler has now; returns the ids of jobs whose worker is new there."""
        self.joined = {}
        new = []
        for name in names:
            job_id = job_of_worker(name)
            if job_id is None:
                continue
            if job_id in self.leaving and self.names.get(job_id, name) != name:
                # Told to leave, it was evicted instead, and its job has started again.
                self.leaving.discard(job_id)
            self.joined[job_id] = self.names[job_id] = name
            if job_id not in self.ever_joined:
                self.ever_joined.add(job_id)
                new.append(job_id)
        if new:
            self.failures, self.last_failure = 0, None
        self.peak = max(self.peak, len(self.joined))
        return new

    def saw_change(self, change: JobChange) -> bool:
        """Take in a job's change; returns whether it is a failure to start, which counts against the budget."""
        unexpected = change.job_id not in self.leaving
        # A removal that we asked for shows in the event log as an eviction first.
        if change.what == "evicted" and unexpected:
            self.evictions += 1
        if change.what == "held":
            self.holds += 1
        never_joined = change.job_id not in self.ever_joined
        record = self.table.records[change.job_id]
        failed_start = (
            unexpected
            and never_joined
            and (change.what == "exited" or (change.what == "held" and record.hold_code != 1))
        )
        if failed_start:
            self.failures += 1
        return failed_start

    def queued_jobs(self) -> list[JobRecord]:
        """Jobs in the queue in any state, told to leave or not."""
        return self.table.in_state(JobState.IDLE, JobState.RUNNING, JobState.HELD)

    def supply(self, answer: Mapping[str, Any] | None, now: float = 0.0) -> Supply:
        """The supply for the policy.

        Args:
            answer: the scheduler's answer, or `None` where it gave none; then joined workers count as busy.
            now: the time, on the monotonic clock.
        """
        active = [
            record
            for record in self.table.in_state(JobState.IDLE, JobState.RUNNING)
            if record.job_id not in self.leaving
        ]
        pending = [record for record in active if record.job_id not in self.joined]
        names = [self.joined[record.job_id] for record in active if record.job_id in self.joined]
        idle_times: Mapping[str, float] = answer["idle"] if answer else {}
        return Supply(
            pending=tuple(record.job_id for record in sorted(pending, key=_submission_order)),
            idle={name: now - float(idle_times[name]) for name in names if name in idle_times},
            busy=tuple(name for name in names if name not in idle_times),
            retiring=tuple(sorted(self.leaving)),
            unstarted=sum(1 for record in pending if record.state is JobState.IDLE),
            failures=self.failures,
            last_failure=self.last_failure,
        )

    def summary(self, now: float) -> dict[str, Any]:
        """What became of the workers, for the flow run's log."""
        records = self.table.records.values()
        seconds = sum(
            record.run_seconds + (max(0.0, now - record.started) if record.started and record.in_queue else 0.0)
            for record in records
        )
        return {
            "jobs": len(records),
            "job_ids": sorted((record.job_id for record in records), key=_id_order),
            "hosts": sorted({record.host for record in records if record.host}),
            "worker_hours": seconds / 3600,
            "peak": self.peak,
            "held": self.holds,
            "evicted": self.evictions,
            "left": len(self.queued_jobs()),
        }


def _id_order(job_id: str) -> tuple[int, int]:
    cluster, _, proc = job_id.partition(".")
    return int(cluster), int(proc)


def _submission_order(record: JobRecord) -> tuple[int, int]:
    return _id_order(record.job_id)
