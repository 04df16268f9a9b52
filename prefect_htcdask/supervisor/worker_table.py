"""The workers of a cluster as the supervisor sees them: HTCondor jobs on one side, Dask workers on the other.

Pure bookkeeping: the loop feeds it job changes and the scheduler's answers, and asks it for demand and supply of each
worker group.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefect_htcdask.condor.job_codes import HoldCode, JobState
from prefect_htcdask.condor.job_events import JobChange, JobRecord, JobTable
from prefect_htcdask.supervisor.policy import Demand, Supply
from prefect_htcdask.worker.names import job_of_worker, worker_name

# Seconds until a worker that could not be retired is asked again, the first time and at most.
_FIRST_STAY = 2.0
_LONGEST_STAY = 60.0


class WorkerStatus(enum.Enum):
    """Where a worker stands, between its job in the queue and the Dask scheduler."""

    PENDING = "pending"
    """Its job waits, or runs and its Dask worker has not joined yet."""

    JOINED = "joined"
    """The scheduler has its Dask worker."""

    DEREGISTERED = "deregistered"
    """Its Dask worker has left the scheduler: the job's process is about to end."""

    HELD = "held"
    ENDED = "ended"


class WorkerTarget(enum.Enum):
    """What a worker is to do, as dask_gateway_server's database has a target beside each status."""

    RUN = "run"
    LEAVE = "leave"


@dataclass
class Worker:
    """A worker job and the Dask worker in it.

    Attributes:
        job: what HTCondor tells of the job.
        target: whether it was told to leave, by removal or retirement.
        name: the last name of its Dask worker; `None` where none has joined yet.
        at_scheduler: whether the scheduler has its Dask worker now.
        joined_start: at which start of its job the Dask worker joined.
        retire_pause: seconds for which it is left alone, since it could not be retired.
        retire_at: until when (monotonic seconds).
        wait: seconds from the job's submission to its first start.
        hold_reason: why the job was held the last time; a held job is removed, with another reason, at once.
        evictions: how often the job lost its slot without having been told to leave.
    """

    job: JobRecord
    target: WorkerTarget = WorkerTarget.RUN
    name: str | None = None
    at_scheduler: bool = False
    joined_start: int | None = None
    retire_pause: float = 0.0
    retire_at: float = 0.0
    wait: float | None = None
    hold_reason: str | None = None
    evictions: int = 0

    @property
    def status(self) -> WorkerStatus:
        """Where it stands now."""
        if not self.job.in_queue:
            return WorkerStatus.ENDED
        if self.job.state is JobState.HELD:
            return WorkerStatus.HELD
        if self.at_scheduler:
            return WorkerStatus.JOINED
        if self.job.state is JobState.RUNNING and self.joined_start == self.job.starts:
            return WorkerStatus.DEREGISTERED
        return WorkerStatus.PENDING

    @property
    def is_leaving(self) -> bool:
        """Whether it was told to leave."""
        return self.target is WorkerTarget.LEAVE

    @property
    def has_joined(self) -> bool:
        """Whether its Dask worker was at the scheduler at some time."""
        return self.name is not None

    def saw_at_scheduler(self, name: str) -> bool:
        """The scheduler has its Dask worker; returns whether that is the first time."""
        first = not self.has_joined
        if self.name != name:
            # Told to leave, it was evicted instead, and its job has started again.
            if not first:
                self.target = WorkerTarget.RUN
            self.retire_pause = self.retire_at = 0.0
        self.name, self.at_scheduler, self.joined_start = name, True, self.job.starts
        return first

    def saw_absent(self) -> None:
        """The scheduler does not have its Dask worker."""
        self.at_scheduler = False
        self.retire_pause = self.retire_at = 0.0

    def retire_failed(self, now: float) -> None:
        """It could not be retired, and is asked again ever later.

        A worker that got a task stays for that; one whose results find no place would else be told to go each round.
        """
        self.target = WorkerTarget.RUN
        again = now < self.retire_at + self.retire_pause
        self.retire_pause = min(2 * self.retire_pause, _LONGEST_STAY) if again else _FIRST_STAY
        self.retire_at = now + self.retire_pause

    def saw_change(self, change: JobChange) -> bool:
        """Take in its job's change; returns whether it is a failure to start, which counts against a budget."""
        if change.what == "held":
            self.hold_reason = change.reason
        # A removal that we asked for shows in the event log as an eviction first.
        elif change.what == "evicted" and not self.is_leaving:
            self.evictions += 1
        # Several starts between two looks are rare, and then the last is the best that is known.
        elif change.what == "started" and self.wait is None and self.job.submitted and self.job.last_start:
            self.wait = max(0.0, self.job.last_start - self.job.submitted)
        if self.is_leaving or self.has_joined:
            return False
        return change.what in ("exited", "removed") or (
            change.what == "held" and self.job.hold_code != HoldCode.USER_REQUEST
        )


@dataclass
class WorkerTable:
    """Workers of one cluster.

    Attributes:
        groups: names of the worker groups, the default group first.
        table: all jobs known.
        peak: the most workers that were ever at the scheduler.
        peaks: the same of each group, where there are several.
    """

    groups: Sequence[str] = ("default",)
    table: JobTable = field(default_factory=JobTable)
    peak: int = 0
    peaks: dict[str, int] = field(default_factory=dict)
    _workers: dict[str, Worker] = field(default_factory=dict)

    def get(self, job_id: str) -> Worker:
        """The worker of a job, made if it is new."""
        if (worker := self._workers.get(job_id)) is None:
            worker = self._workers[job_id] = Worker(self.table.get(job_id))
        return worker

    def workers(self, group: str | None = None) -> list[Worker]:
        """All workers that there ever were, or those of a group."""
        every = [self.get(job_id) for job_id in self.table.records]
        return every if group is None else [worker for worker in every if self.group_of(worker.job) == group]

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

    def saw_workers(self, names: Iterable[str]) -> list[Worker]:
        """Take in the workers that the scheduler has now; returns those that are new there."""
        present = {job_id: name for name in names if (job_id := job_of_worker(name)) is not None}
        new = [worker for job_id, name in present.items() if (worker := self.get(job_id)).saw_at_scheduler(name)]
        for worker in self.workers():
            if worker.job.job_id not in present:
                worker.saw_absent()
        self.peak = max(self.peak, len(present))
        if len(self.groups) > 1:
            counts = Counter(self.group_of(self.table.get(job_id)) for job_id in present)
            self.peaks.update({group: max(count, self.peaks.get(group, 0)) for group, count in counts.items()})
        return new

    def mark_leaving(self, job_ids: Iterable[str]) -> None:
        """Jobs were told to leave, by their removal."""
        for job_id in job_ids:
            self.get(job_id).target = WorkerTarget.LEAVE

    def mark_retiring(self, names: Iterable[str]) -> dict[str, Worker]:
        """Workers are being retired; returns them by their names, as far as the scheduler has them."""
        chosen = set(names)
        found = {worker.name: worker for worker in self.workers() if worker.at_scheduler and worker.name in chosen}
        for worker in found.values():
            worker.target = WorkerTarget.LEAVE
        return {name: worker for name, worker in found.items() if name is not None}

    def release_all(self) -> None:
        """Nobody is told to leave any more: another supervisor has taken over."""
        for worker in self.workers():
            worker.target = WorkerTarget.RUN

    def evicted(self, changes: Iterable[JobChange]) -> list[str]:
        """Names of workers whose jobs were evicted, removed or held, but for those held for their memory."""
        return [
            worker_name(change.job_id, record.starts)
            for change in changes
            for record in [self.table.records[change.job_id]]
            if record.starts
            and (
                change.what in ("evicted", "removed")
                or (change.what == "held" and record.hold_code != HoldCode.JOB_OUT_OF_RESOURCES)
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
        staying = set()
        for worker in self.workers():
            status, record, name = worker.status, worker.job, worker.name
            group = self.group_of(record)
            if status in (WorkerStatus.HELD, WorkerStatus.ENDED):
                continue
            if worker.at_scheduler and name is not None and now < worker.retire_at:
                staying.add(name)
            if worker.is_leaving or status is WorkerStatus.DEREGISTERED or (worker.at_scheduler and name in closing):
                # Gone, as far as the policy is concerned: where there is demand, another one is asked for.
                retiring[group].append(name if worker.at_scheduler and name is not None else record.job_id)
            elif status is WorkerStatus.PENDING or name is None:
                pending[group].append(record)
            elif name in idle_times:
                idle[group][name] = now - float(idle_times[name])
            else:
                busy[group].append(name)
        return {
            group: Supply(
                pending=tuple(record.job_id for record in sorted(pending[group], key=submission_order)),
                unstarted=sum(1 for record in pending[group] if record.state is JobState.IDLE),
                idle=idle[group],
                busy=tuple(busy[group]),
                holding=holding & idle[group].keys(),
                retiring=tuple(retiring[group]),
                staying=frozenset(staying),
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
            "held": sum(record.holds for record in records),
            "evicted": sum(worker.evictions for worker in self.workers()),
            "left": len(self.queued_jobs()),
        }


def run_seconds(record: JobRecord, now: float) -> float:
    return record.run_seconds + (max(0.0, now - record.started) if record.started and record.in_queue else 0.0)


def _id_order(job_id: str) -> tuple[int, int]:
    cluster, _, proc = job_id.partition(".")
    return int(cluster), int(proc)


def submission_order(record: JobRecord) -> tuple[int, int]:
    return _id_order(record.job_id)
