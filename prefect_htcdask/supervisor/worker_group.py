"""One worker group of a cluster, as the supervisor knows it: what is wanted of it, and what its jobs have taught."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter, deque
from dataclasses import dataclass, field

from prefect_htcdask.condor.job_events import JobRecord
from prefect_htcdask.condor.submit_description import JobFiles, WorkerSpec, string_literal
from prefect_htcdask.scheduler.task_kinds import DEFAULT_GROUP
from prefect_htcdask.supervisor.policy import PolicySettings, Supply, Target
from prefect_htcdask.supervisor.protocol import GroupPlan

_LATEST = 50
_FIRST_BACKOFF = 1.0
_MAX_BACKOFF = 60.0


@dataclass
class WorkerGroup:
    """One worker group. Times are seconds of the monotonic clock, durations seconds.

    Attributes:
        name: its name.
        plan: what was handed over.
        unit: what its workers are called where a decision is told.
        target: how many workers are wanted.
        files: what its jobs take with them.
        waits: how long the latest jobs waited in the queue before they started, oldest first.
        boots: how long the latest workers took from their job's start until they joined.
        failed_on: where the jobs ran, in a row, that ended or were held before their worker joined; empty where one
            never ran.
        last_failure: when the last of them did.
        last_failed: that job.
        waiting_since: since when somebody waits for the first worker.
        has_joined: whether a worker ever joined.
        avoided: machines where several workers in a row did not come up: no more jobs go there.
        gave_up: whether workers cannot be had, as was told.
        submit_after: no submission before this time: the schedd took none or not all of the last one.
        not_taken: why it did not, in words; empty where it took all.
    """

    name: str
    plan: GroupPlan
    unit: str
    target: Target
    files: JobFiles | None = None
    waits: deque[float] = field(default_factory=lambda: deque(maxlen=_LATEST))
    boots: deque[float] = field(default_factory=lambda: deque(maxlen=_LATEST))
    failed_on: list[str] = field(default_factory=list)
    last_failure: float | None = None
    last_failed: JobRecord | None = None
    waiting_since: float | None = None
    has_joined: bool = False
    avoided: set[str] = field(default_factory=set)
    gave_up: bool = False
    submit_after: float = 0.0
    not_taken: str = ""
    backoff: float = _FIRST_BACKOFF
    looked_at: int = 0

    @property
    def spec(self) -> WorkerSpec:
        """What one worker is."""
        return self.plan.spec

    @property
    def settings(self) -> str:
        """Where its settings stand: what it is called there, or `worker` where no group has a name."""
        return "worker" if self.name == DEFAULT_GROUP and self.unit != self.name else f"workers.{self.name}"

    @property
    def job_spec(self) -> WorkerSpec:
        """What a worker is that is submitted now: it keeps off the machines to be avoided."""
        if not self.avoided:
            return self.spec
        elsewhere = " && ".join(f"TARGET.Machine =!= {string_literal(name)}" for name in sorted(self.avoided))
        own = f"({self.spec.requirements}) && " if self.spec.requirements else ""
        return dataclasses.replace(self.spec, requirements=own + elsewhere)

    @property
    def failures(self) -> int:
        """Bad starts in a row, for the failure budget: those on one machine that is avoided now count as one."""
        return sum(1 for machine in self.failed_on if machine not in self.avoided) + len(
            self.avoided.intersection(self.failed_on)
        )

    def suspects(self) -> set[str]:
        """Machines where two workers in a row or more did not come up; each time there is one more failure."""
        if len(self.failed_on) == self.looked_at:
            return set()
        self.looked_at = len(self.failed_on)
        counts = Counter(machine for machine in self.failed_on if machine)
        return {machine for machine, count in counts.items() if count > 1} - self.avoided

    def avoid(self, suspects: set[str], machines: set[str]) -> set[str]:
        """Submit no more to machines, if the pool has others that may do better; returns those newly avoided."""
        if not machines - self.avoided - set(self.failed_on):
            return set()
        self.avoided |= suspects & machines
        return suspects & machines

    def wants(self, target: Target) -> None:
        """Take a new target. Who asks again gets a fresh failure budget, and the time that a first worker may take."""
        self.target = target
        self._start_afresh()
        self.avoided.clear()
        self.submit_after, self.backoff = 0.0, _FIRST_BACKOFF
        self.waiting_since = None

    # What happens to its jobs

    def started(self, record: JobRecord) -> None:
        """A job has started: learn how long it waited, unless it had run before."""
        if record.starts == 1 and record.started is not None and record.submitted:
            self.waits.append(max(0.0, record.started - record.submitted))

    def joined(self, record: JobRecord, when: float | None) -> None:
        """A job's worker has joined the scheduler, at the Unix time `when` if that is known."""
        self._start_afresh()
        self.has_joined = True
        if when is not None and record.started is not None:
            self.boots.append(max(0.0, when - record.started))

    def failed(self, record: JobRecord, now: float) -> None:
        """A job ended or was held before its worker joined."""
        self.failed_on.append((record.host or "").rpartition("@")[2])
        self.last_failure, self.last_failed = now, record

    def _start_afresh(self) -> None:
        self.failed_on, self.looked_at = [], 0
        self.last_failure, self.gave_up = None, False

    def wanted(self, workers: int, now: float) -> None:
        """So many workers are wanted: as long as there are some, somebody waits for the first.

        Jobs that were submitted for an earlier wish, or by a predecessor, are waited for as well.
        """
        self.waiting_since = (self.waiting_since or now) if workers else None

    def submitted(self) -> None:
        """The schedd took new jobs."""
        self.backoff, self.not_taken = _FIRST_BACKOFF, ""

    def refused(self, now: float, why: str = "") -> float:
        """The schedd took no jobs, or not all; returns how long the next attempt is put off."""
        self.not_taken = why
        pause, self.backoff = self.backoff, min(self.backoff * 2, _MAX_BACKOFF)
        self.submit_after = now + pause
        return pause

    # For the policy

    def supply(self, jobs: Supply) -> Supply:
        """The supply, from that of the jobs as they are now."""
        return dataclasses.replace(
            jobs,
            waits=tuple(self.waits),
            boot=statistics.median(self.boots) if self.boots else jobs.boot,
            failures=self.failures,
            last_failure=self.last_failure,
        )

    def policy(self, residence: float, max_idle_jobs: int, max_failures: int) -> PolicySettings:
        """The policy's settings for this group."""
        return PolicySettings(
            target=self.target,
            group=self.unit,
            threads=self.spec.threads,
            residence=residence,
            max_idle_jobs=max_idle_jobs,
            max_failures=max_failures,
        )

    def overdue(self, now: float) -> bool:
        """Whether its first worker takes longer than its start timeout."""
        if self.gave_up or self.has_joined or self.waiting_since is None or not self.plan.start_timeout:
            return False
        return now - self.waiting_since >= self.plan.start_timeout


def idle_job_caps(unstarted: dict[str, int], cap: int) -> dict[str, int]:
    """How many jobs of each group may wait in the queue, so that all together are no more than the cap.

    A group with many waiting jobs leaves some of the cap to the others: a group whose tasks come later may be the one
    for which the pool has room.

    Args:
        unstarted: jobs that wait in the queue, by group.
        cap: jobs that may wait in all.
    """
    reserve = cap // (2 * len(unstarted))
    return {
        name: max(0, cap - sum(max(waiting, reserve) for other, waiting in unstarted.items() if other != name))
        for name in unstarted
    }
