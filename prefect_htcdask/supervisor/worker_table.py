"""The workers of a cluster as the supervisor sees them: HTCondor jobs on one side, Dask workers on the other.

Pure bookkeeping: the loop feeds it job changes and the scheduler's answers, and asks it for demand and supply of each
worker group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefect_htcdask.condor.job_events import JobChange, JobRecord, JobState, JobTable
from prefect_htcdask.supervisor.policy import Demand, Supply
from prefect_htcdask.worker.names import job_of_worker, worker_name

# HoldReasonCode
HELD_BY_USER = 1
HELD_FOR_MEMORY = 34

# Seconds until a worker that could not be retired is asked again, the first time and at most.
_FIRST_STAY = 2.0
_LONGEST_STAY = 60.0


@dataclass
class WorkerTable:
    """Jobs and workers of one cluster.

    Attributes:
        groups: names of the worker groups, the default group first.
        table: all jobs known.
        joined: names of workers at the scheduler now, by job id.
        names: the last name of each job's worker, also of those that left.
        joined_start: at which start of its job each worker joined.
        ever_joined: ids of jobs whose worker was at the scheduler at some time.
        leaving: ids of jobs that were told to go, by removal or retirement.
        stays: workers that could not be retired, by their names: for how many seconds, and until when (monotonic),
            they are left alone.
        peaks: the most workers that each group ever had at the scheduler.
    """

    groups: Sequence[str] = ("default",)
    table: JobTable = field(default_factory=JobTable)
    joined: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    ever_joined: set[str] = field(default_factory=set)
    joined_start: dict[str, int] = field(default_factory=dict)
    leaving: set[str] = field(default_factory=set)
    stays: dict[str, tuple[float, float]] = field(default_factory=dict)
    peak: int = 0
    peaks: dict[str, int] = field(default_factory=dict)
    evictions: int = 0
    holds: int = 0

    def submitted_jobs(self, job_ids: Iterable[str], group: str, now: float) -> None:
        """Take in jobs that were just submitted, before the event log tells of them."""
        for job_id in job_ids:
            record = self.table.get(job_id)
            record.group, record.submitted = group, now

    def group_of(self, record: JobRecord) -> str:
        """The worker group of a job. One that another supervisor's groups know counts as of the default group."""
        return record.group if record.group in self.groups else self.groups[0]

    def group_of_worker(self, name: str) -> str | None:
        """The worker group of a worker, by its name; `None` for one that is not ours."""
        job_id = job_of_worker(name)
        return None if job_id is None else self.group_of(self.table.get(job_id))

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
            self.joined_start[job_id] = self.table.get(job_id).starts
            if job_id not in self.ever_joined:
                self.ever_joined.add(job_id)
                new.append(job_id)
        if self.stays:
            present = set(self.joined.values())
            self.stays = {name: stay for name, stay in self.stays.items() if name in present}
        self.peak = max(self.peak, len(self.joined))
        if len(self.groups) > 1:
            counts = Counter(self.group_of(self.table.get(job_id)) for job_id in self.joined)
            self.peaks.update({group: max(count, self.peaks.get(group, 0)) for group, count in counts.items()})
        return new

    def mark_retiring(self, names: Iterable[str]) -> dict[str, str]:
        """Workers are being retired; returns their jobs by their names, as far as they are known."""
        chosen = set(names)
        jobs = {name: job_id for job_id, name in self.joined.items() if name in chosen}
        self.leaving.update(jobs.values())
        return jobs

    def retire_failed(self, jobs: Mapping[str, str], now: float) -> None:
        """Workers, given with their jobs, could not be retired: they are asked again ever later.

        A worker that got a task stays for that; one whose results find no place would else be told to go each round.
        """
        self.leaving.difference_update(jobs.values())
        for name in jobs:
            last, until = self.stays.get(name, (0.0, 0.0))
            stay = min(2 * last, _LONGEST_STAY) if now < until + last else _FIRST_STAY
            self.stays[name] = stay, now + stay

    def saw_change(self, change: JobChange) -> bool:
        """Take in a job's change; returns whether it is a failure to start, which counts against a budget."""
        unexpected = change.job_id not in self.leaving
        # A removal that we asked for shows in the event log as an eviction first.
        if change.what == "evicted" and unexpected:
            self.evictions += 1
        if change.what == "held":
            self.holds += 1
        never_joined = change.job_id not in self.ever_joined
        record = self.table.records[change.job_id]
        return (
            unexpected
            and never_joined
            and (change.what in ("exited", "removed") or (change.what == "held" and record.hold_code != HELD_BY_USER))
        )

    def deregistered(self, record: JobRecord) -> bool:
        """Whether a job's worker was at the scheduler since the job's last start: its process is about to end."""
        return self.joined_start.get(record.job_id) == record.starts

    def evicted(self, changes: Iterable[JobChange]) -> list[str]:
        """Names of workers whose jobs were evicted, removed or held, but for those held for their memory."""
        return [
            worker_name(change.job_id, record.starts)
            for change in changes
            for record in [self.table.records[change.job_id]]
            if record.starts
            and (
                change.what in ("evicted", "removed") or (change.what == "held" and record.hold_code != HELD_FOR_MEMORY)
            )
        ]

    def queued_jobs(self) -> list[JobRecord]:
        """Jobs in the queue in any state, told to leave or not."""
        return self.table.in_state(JobState.IDLE, JobState.RUNNING, JobState.HELD)

    def demands(self, answer: Mapping[str, Any]) -> dict[str, Demand]:
        """The demand of each group for the policy, from the scheduler's answer.

        A worker that takes no more tasks keeps the last until that ends, or hands it back: it wants no other thread.
        """
        in_hand: dict[str, dict[str, int]] = {group: {} for group in self.groups}
        closing = frozenset(answer.get("closing", ()))
        for name, count in answer["in_hand"].items():
            group = self.group_of_worker(name)
            if group is not None and name not in closing:
                in_hand[group][name] = count
        counts: Mapping[str, Mapping[str, Any]] = answer["groups"]
        return {
            group: Demand(
                queued=told.get("queued", 0),
                in_hand=in_hand[group],
                stacked=told.get("stacked", 0),
                coming=told.get("coming", {}),
                task_seconds=told.get("task_seconds", 0.0),
                work=told.get("work", 0.0),
                unknown=told.get("unknown", 0),
            )
            for group in self.groups
            for told in [counts.get(group, {})]
        }

    def supplies(self, answer: Mapping[str, Any] | None, now: float) -> dict[str, Supply]:
        """The supply of each group for the policy, as far as the jobs tell.

        Args:
            answer: the scheduler's answer, or `None` where it gave none; then joined workers count as busy.
            now: the time, on the monotonic clock.
        """
        idle_times: Mapping[str, float] = answer["idle"] if answer else {}
        holding = frozenset(answer.get("holding", ())) if answer else frozenset()
        closing = frozenset(answer.get("closing", ())) if answer else frozenset()
        pending: dict[str, list[JobRecord]] = {group: [] for group in self.groups}
        idle: dict[str, dict[str, float]] = {group: {} for group in self.groups}
        busy: dict[str, list[str]] = {group: [] for group in self.groups}
        retiring: dict[str, list[str]] = {group: [] for group in self.groups}
        for record in self.table.in_state(JobState.IDLE, JobState.RUNNING):
            group, name = self.group_of(record), self.joined.get(record.job_id)
            if record.job_id in self.leaving or name in closing:
                # Gone, as far as the policy is concerned: where there is demand, another one is asked for.
                retiring[group].append(name or record.job_id)
            elif name is None and record.state is JobState.RUNNING and self.deregistered(record):
                retiring[group].append(record.job_id)
            elif name is None:
                pending[group].append(record)
            elif name in idle_times:
                idle[group][name] = now - float(idle_times[name])
            else:
                busy[group].append(name)
        staying = frozenset(name for name, (_, until) in self.stays.items() if now < until)
        return {
            group: Supply(
                pending=tuple(record.job_id for record in sorted(pending[group], key=submission_order)),
                unstarted=sum(1 for record in pending[group] if record.state is JobState.IDLE),
                idle=idle[group],
                busy=tuple(busy[group]),
                holding=holding & idle[group].keys(),
                retiring=tuple(retiring[group]),
                staying=staying,
            )
            for group in self.groups
        }

    def summary(self, now: float) -> dict[str, Any]:
        """What became of the workers, for the flow run's log."""
        records = self.table.records.values()
        seconds = {record.job_id: run_seconds(record, now) for record in records}
        groups = {
            name: {
                "jobs": len(of_group := [record.job_id for record in records if self.group_of(record) == name]),
                "worker_hours": sum(seconds[job_id] for job_id in of_group) / 3600,
                "peak": self.peaks.get(name, 0),
            }
            for name in self.groups
        }
        return {
            **({"groups": groups} if len(self.groups) > 1 else {}),
            "jobs": len(records),
            "job_ids": sorted((record.job_id for record in records), key=_id_order),
            "hosts": sorted({record.host for record in records if record.host}),
            "worker_hours": sum(seconds.values()) / 3600,
            "peak": self.peak,
            "held": self.holds,
            "evicted": self.evictions,
            "left": len(self.queued_jobs()),
        }


def run_seconds(record: JobRecord, now: float) -> float:
    return record.run_seconds + (max(0.0, now - record.started) if record.started and record.in_queue else 0.0)


def _id_order(job_id: str) -> tuple[int, int]:
    cluster, _, proc = job_id.partition(".")
    return int(cluster), int(proc)


def submission_order(record: JobRecord) -> tuple[int, int]:
    return _id_order(record.job_id)
