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

FIRST_TRIAL = 60.0
LONGEST_TRIAL = 960.0
"""Seconds from the last failure to a single trial, where the failure budget is spent and others work: doubled each time
up to the longer one."""

RECENT_WAITS = 50
"""Waits that a group's expected arrival is learned from."""

FIRST_WAIT = 60.0
"""Seconds that a job is taken to wait before any has started: HTCondor's default negotiation cycle."""

TOGETHER = 0.5
"""Share of its residence that a worker stays longer, at most, to leave with others that are about to have idled out: so
that at the end of a burst there is not a decision, a line and an event each second."""

LONGEST_TOGETHER = 10.0
"""Seconds of that at most."""

PENDING_STAY = 2.0
"""Times the expected arrival that pending jobs are kept ahead of their tasks."""


@dataclass(frozen=True)
class Demand:
    """What the scheduler has for the group to run.

    Attributes:
        queued: tasks that are ready and not with a worker.
        in_hand: tasks assigned to a worker, by the worker's name; no entry for an idle worker.
        stacked: how many of those in hand cannot begin before others end, though their worker may have free threads:
            tasks with Dask resources pile up so.
        coming: tasks that wait for nothing but results of tasks in hand: how many are expected to be ready in so many
            seconds from now; below 0 where they are late.
        work: seconds that what is queued and in hand takes in all, as far as is known.
        unknown: how many of these tasks are of a kind of which none has ended yet.
        task_seconds: what a task took on average so far; 0: none has ended.
    """

    queued: int = 0
    in_hand: Mapping[str, int] = field(default_factory=dict)
    stacked: int = 0
    coming: Mapping[float, int] = field(default_factory=dict)
    work: float = 0.0
    unknown: int = 0
    task_seconds: float = 0.0

    @property
    def tasks(self) -> int:
        """All tasks that want a thread."""
        return self.queued + sum(self.in_hand.values())

    def waiting(self, threads: int) -> int:
        """Those of them that have none, where a worker has so many."""
        return self.queued + max(self.stacked, self.beyond(threads))

    def beyond(self, threads: int) -> int:
        """Tasks in hand beyond their workers' threads."""
        return sum(count - threads for count in self.in_hand.values() if count > threads)

    def ready_within(self, seconds: float, ahead: float = 1.0) -> int:
        """Tasks that are not ready yet, but are expected to be within so many times this time; late by it at most."""
        return sum(count for at, count in self.coming.items() if -seconds <= at <= ahead * seconds)

    def mean(self) -> float:
        """Seconds that one of the tasks takes, as far as is known; 0: it is not."""
        return self.work / self.tasks if self.work > 0 and self.tasks else self.task_seconds


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
        staying: those that were told so a short while ago and could not go: they are not asked again yet.
        waits: seconds that the latest jobs of the group waited before they started, oldest first.
        boot: seconds from a job's start until its worker joins.
        failures: jobs in a row that ended, were held or vanished before they were of use.
        last_failure: when the last of these was; `None`: there was none.
    """

    pending: tuple[str, ...] = ()
    unstarted: int = 0
    idle: Mapping[str, float] = field(default_factory=dict)
    busy: tuple[str, ...] = ()
    holding: frozenset[str] = frozenset()
    retiring: tuple[str, ...] = ()
    staying: frozenset[str] = frozenset()
    waits: Sequence[float] = ()
    boot: float = 10.0
    failures: int = 0
    last_failure: float | None = None

    @property
    def arrival(self) -> float:
        """Seconds in which a job that is submitted now may have joined: one in four of the latest was as quick.

        What is asked for this long ahead comes too late more often than it comes too early, and idles.
        """
        recent = sorted(self.waits[-RECENT_WAITS:])
        return (recent[len(recent) // 4] if recent else FIRST_WAIT) + self.boot

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
        threads: tasks that one worker runs at once, where they want no more than a thread.
        residence: how long a worker may be idle before it is removed; a little longer where others follow (`TOGETHER`).
        max_idle_jobs: jobs that may wait in the queue at once, while adapting.
        max_failures: failures in a row after which no more jobs are submitted, but for trials where others work.
    """

    target: Target = Target()
    group: str = ""
    threads: int = 1
    residence: float = 5.0
    max_idle_jobs: int = 5000
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
        goes_on: the same, where the budget is spent but workers that have joined go on with the work until the next
            trial; else empty.
    """

    target: int
    submit: int = 0
    remove_pending: tuple[str, ...] = ()
    retire: tuple[str, ...] = ()
    reason: str = ""
    gives_up: str = ""
    goes_on: str = ""

    @property
    def changes(self) -> bool:
        """Whether anything is to be done."""
        return bool(self.submit or self.remove_pending or self.retire)


def wanted_workers(demand: Demand, supply: Supply, settings: PolicySettings, ahead: float = 1.0) -> int:
    """How many workers the demand asks for, within the target's bounds.

    A task needs a thread whether it waits or runs, and so does one that will be ready by the time a worker that is
    asked for now joins. One that is later than that by as long is not believed in any more: it may be later still.
    Pending workers do not lower the number, so a first worker's arrival changes nothing.

    Args:
        demand: what the scheduler has to run.
        supply: the workers there are.
        settings: how to behave.
        ahead: how many times as far to look.
    """
    target = settings.target
    if target.fixed is not None:
        return target.fixed
    return min(max(_workers_for(demand, supply, settings, ahead), target.minimum), target.maximum)


def _workers_for(demand: Demand, supply: Supply, settings: PolicySettings, ahead: float = 1.0) -> int:
    tasks = demand.tasks + demand.ready_within(supply.arrival, ahead)
    return math.ceil(tasks / _tasks_at_once(demand, settings))


def useful_pending(demand: Demand, supply: Supply, settings: PolicySettings) -> int:
    """How many jobs would still find a task when they join, were they submitted now.

    By then each thread at the scheduler can have ended `arrival / mean` of the tasks there are. One of a kind of which
    none has ended yet may be long: it is taken to wait still.
    """
    at_once = _tasks_at_once(demand, settings)
    left: float = demand.tasks + demand.ready_within(supply.arrival)
    mean = demand.mean()
    if mean > 0:
        ended = at_once * supply.joined * supply.arrival / mean
        left = max(left - ended, min(demand.unknown, demand.waiting(settings.threads)))
    return math.ceil(left / at_once)


def _tasks_at_once(demand: Demand, settings: PolicySettings) -> float:
    """Tasks that one worker runs at once.

    Where tasks wait on workers that have free threads, they want something else too, a GPU say: then as many as the
    busy workers run at once now.
    """
    threads = max(1, settings.threads)
    if demand.stacked <= demand.beyond(threads):
        return threads
    running = sum(demand.in_hand.values()) - demand.stacked
    return max(1.0, min(threads, running / max(1, len(demand.in_hand))))


def backoff(failures: int) -> float:
    """Seconds without a submission after so many failures in a row."""
    return min(FIRST_BACKOFF * 2.0 ** min(failures - 1, 30), LONGEST_BACKOFF) if failures else 0.0


def trial_pause(failures: int, max_failures: int) -> float:
    """Seconds from the last of so many failures in a row to a trial, where these are all that may be."""
    return min(FIRST_TRIAL * 2.0 ** min(failures - max_failures, 30), LONGEST_TRIAL)


def decide(demand: Demand | None, supply: Supply, settings: PolicySettings, now: float) -> Decision:
    """Decide what to submit, remove and retire.

    Args:
        demand: what the scheduler has to run; `None` where it did not answer, which keeps everything as it is.
        supply: the workers there are.
        settings: how to behave.
        now: the time.

    Returns:
        the decision: pending jobs go before joined workers, busy workers are never chosen while adapting. A fixed
        number that is lower than the busy workers lets busy ones go too, last and fewest, when their tasks have ended:
        the user asked for it.
    """
    if demand is None:
        return Decision(target=supply.total)
    wanted = wanted_workers(demand, supply, settings)
    if wanted > supply.total:
        return _grow(wanted, demand, supply, settings, now)
    if wanted < supply.total:
        return _shrink(wanted, demand, supply, settings, now)
    return Decision(target=wanted)


def _grow(wanted: int, demand: Demand, supply: Supply, settings: PolicySettings, now: float) -> Decision:
    spent = supply.failures >= settings.max_failures
    text = f"{supply.failures} workers in a row ended before they joined the scheduler"
    if spent and not supply.joined:
        # One that has started may yet join and end the row.
        starting = len(supply.pending) > supply.unstarted
        return Decision(target=wanted, gives_up="" if starting else f"{text}; no more are submitted")
    pause = trial_pause(supply.failures, settings.max_failures) if spent else backoff(supply.failures)
    too_early = supply.last_failure is not None and now < supply.last_failure + pause
    if spent and (too_early or supply.pending):
        others = f"though {wanted} are wanted, the work goes on with {supply.joined}; one is tried after {pause:.0f} s"
        return Decision(target=wanted, goes_on=f"{text}: {others}")
    if too_early:
        return Decision(target=wanted)
    submit, note = (1, f" (a trial after {supply.failures} failures)") if spent else (wanted - supply.total, "")
    if settings.target.fixed is None:
        # Who asks for a number by name gets it; usefulness and politeness are for what is asked by arithmetic.
        useful = useful_pending(demand, supply, settings) - len(supply.pending)
        submit = min(submit, max(useful, settings.target.minimum - supply.total))
        room = settings.max_idle_jobs - supply.unstarted
        if submit > room:
            submit, note = room, " (adaptive.max_idle_jobs)"
    if submit <= 0:
        return Decision(target=wanted)
    return Decision(target=wanted, submit=submit, reason=_reason(demand, supply, settings, submit) + note)


def _shrink(wanted: int, demand: Demand, supply: Supply, settings: PolicySettings, now: float) -> Decision:
    surplus = supply.total - wanted
    fixed = settings.target.fixed is not None
    if not fixed and demand.waiting(settings.threads):
        # Tasks wait for a thread: nothing that could serve them goes, whatever the arithmetic of threads says.
        return Decision(target=wanted)
    # The newest go first: the oldest are next to start. What was asked for ahead stays though the expected arrival,
    # which each start teaches anew, gets shorter: quick starts are no reason to drop those that are about to start.
    removable = min(surplus, max(0, supply.total - wanted_workers(demand, supply, settings, PENDING_STAY)))
    remove = tuple(reversed(supply.pending))[:removable]
    surplus = surplus - len(remove) if len(remove) == len(supply.pending) else 0
    # Those without results first: there is nothing to move.
    order = sorted(supply.idle, key=lambda name: (name in supply.holding, supply.idle[name], name))
    if fixed:
        order += sorted(supply.busy, key=lambda name: (demand.in_hand.get(name, 0), name))
    else:
        order = [name for name in order if now - supply.idle[name] >= settings.residence and name not in demand.in_hand]
        if len(order) == supply.joined and supply.holding:
            # Results of the last worker have nowhere to go to.
            order.pop()
    order = [name for name in order if name not in supply.staying]
    if order and not fixed and _others_follow(order, supply, settings, now):
        order = []
    retire = tuple(order[:surplus])
    gone = len(remove) + len(retire)
    reason = _reason(demand, supply, settings, -gone) if gone else ""
    return Decision(target=wanted, remove_pending=remove, retire=retire, reason=reason)


def _others_follow(idled_out: Sequence[str], supply: Supply, settings: PolicySettings, now: float) -> bool:
    """Whether workers that have idled out wait for others, which will have too before the first of them has to go.

    It must not depend on the demand: more of it would else have more workers leave.
    """
    first = min(supply.idle[name] for name in idled_out)
    together = first + settings.residence + min(TOGETHER * settings.residence, LONGEST_TOGETHER)
    return any(now < since + settings.residence <= together for since in supply.idle.values())


def _reason(demand: Demand, supply: Supply, settings: PolicySettings, change: int) -> str:
    parts = [f"{demand.waiting(settings.threads)} queued"]
    if soon := demand.ready_within(supply.arrival):
        parts.append(f"{soon} ready within {supply.arrival:.0f} s")
    parts += [f"{supply.joined} running", f"{len(supply.pending)} pending"]
    target, asked = settings.target, ""
    if target.fixed is not None:
        asked = f"scale({target.fixed}): "
    elif change > 0 and _workers_for(demand, supply, settings) < target.minimum:
        asked = f"minimum {target.minimum}: "
    return f"{asked}{', '.join(parts)}: {change:+d}{f' {settings.group}' if settings.group else ''}"
