"""How many workers a group gets: from demand and supply to a decision. Pure: no clock, no I/O.

Sets of workers, each a part of the one before (as in distributed's `AdaptiveCore`):

- *supply*: all jobs in the queue that are not held;
- *pending*: those that have not started, or whose worker has not joined the scheduler yet;
- *joined*: those whose worker is at the scheduler; *busy* where it has a task in hand, else *idle*.

Times are seconds of the caller's monotonic clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

FIRST_BACKOFF = 1.0
LONGEST_BACKOFF = 60.0


@dataclass(frozen=True)
class Demand:
    """What the scheduler has for the group to run.

    Attributes:
        queued: tasks that are ready and not with a worker.
        in_hand: tasks assigned to a worker, by the worker's name; no entry for an idle worker.
        coming: tasks that wait for nothing but results of tasks in hand: how many are expected to be ready in so many
            seconds from now; negative where they are late.
        task_seconds: what a task takes on average; 0: not known yet.
        work: seconds that what is queued and in hand takes in all, as far as is known.
    """

    queued: int = 0
    in_hand: Mapping[str, int] = field(default_factory=dict)
    coming: Mapping[float, int] = field(default_factory=dict)
    task_seconds: float = 0.0
    work: float = 0.0

    @property
    def tasks(self) -> int:
        """All tasks that want a thread."""
        return self.queued + sum(self.in_hand.values())


@dataclass(frozen=True)
class Supply:
    """The worker jobs of the group.

    Attributes:
        pending: ids of jobs that have not started or not joined, oldest first.
        unstarted: how many of `pending` still wait in the queue.
        idle: joined workers with no task in hand: name to the time since when.
        busy: names of joined workers with a task in hand.
        holding: idle workers that hold results which no other worker has.
        retiring: names of workers already told to leave; they count as gone.
        waits: seconds that the latest jobs of the group waited before they started, oldest first.
        boot: seconds from a job's start until its worker joins.
        failures: jobs in a row that ended or were held before they were of use.
        last_failure: when the last of these was; `None`: there was none.
    """

    pending: tuple[str, ...] = ()
    unstarted: int = 0
    idle: Mapping[str, float] = field(default_factory=dict)
    busy: tuple[str, ...] = ()
    holding: frozenset[str] = frozenset()
    retiring: tuple[str, ...] = ()
    waits: Sequence[float] = ()
    boot: float = 10.0
    failures: int = 0
    last_failure: float | None = None

    @property
    def joined(self) -> int:
        """Workers at the scheduler."""
        return len(self.idle) + len(self.busy)

    @property
    def total(self) -> int:
        """Workers there are or will be."""
        return len(self.pending) + self.joined


@dataclass(frozen=True)
class Target:
    """What the user asked for: a fixed number of workers, or a range to follow the demand in."""

    fixed: int | None = None
    minimum: int = 0
    maximum: int = 100

    def __post_init__(self) -> None:
        if self.fixed is not None and self.fixed < 0:
            raise ValueError(f"scale({self.fixed}): a number of workers is zero or more")
        if self.minimum < 0 or self.minimum > self.maximum:
            raise ValueError(
                f"adapt(minimum={self.minimum}, maximum={self.maximum}): the minimum is from 0 to the maximum"
            )


@dataclass(frozen=True)
class PolicySettings:
    """How the policy behaves for one group. Times in seconds.

    Attributes:
        target: what the user asked for.
        group: the group's name, for the reason; empty where there is one group only.
        threads: tasks that one worker runs at once.
        residence: how long a worker may be idle before it is removed.
        max_idle_jobs: jobs that may wait in the queue at once, while adapting.
        max_failures: failures in a row after which no more jobs are submitted.
    """

    target: Target = Target()
    group: str = ""
    threads: int = 1
    residence: float = 30.0
    max_idle_jobs: int = 200
    max_failures: int = 3


@dataclass(frozen=True)
class Decision:
    """What to do now. Empty where all is as it should be.

    Attributes:
        target: workers that there should be.
        submit: jobs to submit.
        remove_pending: ids of jobs to remove that have not joined.
        retire: names of workers to retire.
        reason: why, in words for the flow run's log; empty where nothing changes.
        gives_up: why workers cannot be had, where the failure budget is spent; else empty.
    """

    target: int
    submit: int = 0
    remove_pending: tuple[str, ...] = ()
    retire: tuple[str, ...] = ()
    reason: str = ""
    gives_up: str = ""

    @property
    def changes(self) -> bool:
        """Whether anything is to be done."""
        return bool(self.submit or self.remove_pending or self.retire)


def wanted_workers(demand: Demand, settings: PolicySettings) -> int:
    """How many workers the demand asks for, within the target's bounds.

    A task needs a thread whether it waits or runs; pending workers do not lower the number, so a first worker's
    arrival changes nothing.
    """
    target = settings.target
    if target.fixed is not None:
        return target.fixed
    return min(max(math.ceil(demand.tasks / max(1, settings.threads)), target.minimum), target.maximum)


def backoff(failures: int) -> float:
    """Seconds without a submission after so many failures in a row."""
    return min(FIRST_BACKOFF * 2.0 ** min(failures - 1, 30), LONGEST_BACKOFF) if failures else 0.0


def decide(demand: Demand | None, supply: Supply, settings: PolicySettings, now: float) -> Decision:
    """Decide what to submit, remove and retire.

    Args:
        demand: what the scheduler has to run; `None` where it did not answer, which keeps everything as it is.
        supply: the workers there are.
        settings: how to behave.
        now: the time.

    Returns:
        the decision: pending jobs go before joined workers, busy workers are never chosen while adapting. A fixed
        number that is lower than the busy workers lets busy ones go too, last and fewest: the user asked for it.
    """
    if demand is None:
        return Decision(target=supply.total)
    wanted = wanted_workers(demand, settings)
    missing = wanted - supply.total
    if missing > 0:
        return _grow(wanted, missing, demand, supply, settings, now)
    if missing < 0:
        return _shrink(wanted, -missing, demand, supply, settings, now)
    return Decision(target=wanted)


def _grow(wanted: int, missing: int, demand: Demand, supply: Supply, settings: PolicySettings, now: float) -> Decision:
    if supply.failures >= settings.max_failures:
        gives_up = f"{supply.failures} workers in a row ended before they joined the scheduler; no more are submitted"
        return Decision(target=wanted, gives_up=gives_up)
    if supply.last_failure is not None and now < supply.last_failure + backoff(supply.failures):
        return Decision(target=wanted)
    # Who asks for a number by name gets it; politeness is for what is asked by arithmetic.
    fixed = settings.target.fixed is not None
    submit = missing if fixed else min(missing, max(0, settings.max_idle_jobs - supply.unstarted))
    if not submit:
        return Decision(target=wanted)
    return Decision(target=wanted, submit=submit, reason=_reason(demand, supply, settings, submit))


def _shrink(
    wanted: int, surplus: int, demand: Demand, supply: Supply, settings: PolicySettings, now: float
) -> Decision:
    fixed = settings.target.fixed is not None
    if not fixed and demand.queued:
        # Tasks wait for a thread: nothing that could serve them goes, whatever the arithmetic of threads says.
        return Decision(target=wanted)
    # The newest go first: the oldest are next to start.
    remove = tuple(reversed(supply.pending))[:surplus]
    surplus -= len(remove)
    residence = 0.0 if fixed else settings.residence
    longest_idle = sorted(supply.idle, key=lambda name: (supply.idle[name], name))
    retire = tuple(name for name in longest_idle if now - supply.idle[name] >= residence)[:surplus]
    surplus -= len(retire)
    if fixed and surplus > 0:
        fewest_tasks = sorted(supply.busy, key=lambda name: (demand.in_hand.get(name, 0), name))
        retire += tuple(fewest_tasks[:surplus])
    gone = len(remove) + len(retire)
    reason = _reason(demand, supply, settings, -gone) if gone else ""
    return Decision(target=wanted, remove_pending=remove, retire=retire, reason=reason)


def _reason(demand: Demand, supply: Supply, settings: PolicySettings, change: int) -> str:
    state = f"{demand.queued} queued, {supply.joined} running, {len(supply.pending)} pending"
    return f"{state}: {change:+d}{f' {settings.group}' if settings.group else ''}"
