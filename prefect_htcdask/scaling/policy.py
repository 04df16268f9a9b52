"""How many workers: from demand and supply to a decision. Pure: no clock, no I/O.

Sets of workers, each a part of the one before (as in distributed's `AdaptiveCore`):

- *supply*: all jobs in the queue that are not held;
- *pending*: those that have not started, or whose worker has not joined the scheduler yet;
- *joined*: those whose worker is at the scheduler; *busy* where it has a task in hand, else *idle*.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Demand:
    """What the scheduler has to run.

    Attributes:
        queued: tasks that are ready and not with a worker.
        in_hand: tasks assigned to a worker, by the worker's name; no entry for an idle worker.
    """

    queued: int = 0
    in_hand: Mapping[str, int] = field(default_factory=dict)

    @property
    def tasks(self) -> int:
        """All tasks that want a thread."""
        return self.queued + sum(self.in_hand.values())


@dataclass(frozen=True)
class Supply:
    """The worker jobs there are.

    Attributes:
        pending: ids of jobs that have not started or not joined, oldest first.
        idle: joined workers with no task in hand: name to seconds of idleness.
        busy: names of joined workers with a task in hand.
        retiring: names of workers already told to leave; they count as gone.
        unstarted: how many of `pending` still wait in the queue.
    """

    pending: tuple[str, ...] = ()
    idle: Mapping[str, float] = field(default_factory=dict)
    busy: tuple[str, ...] = ()
    retiring: tuple[str, ...] = ()
    unstarted: int = 0

    @property
    def total(self) -> int:
        """Workers there are or will be."""
        return len(self.pending) + len(self.idle) + len(self.busy)


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
    """How the policy behaves. Times in seconds.

    Attributes:
        threads: tasks that one worker runs at once.
        residence: how long a worker may be idle before it is removed.
        max_idle_jobs: jobs that may wait in the queue at once, while adapting.
        submit_allowed: False while a failure budget or a backoff forbids new jobs.
    """

    threads: int = 1
    residence: float = 30.0
    max_idle_jobs: int = 200
    submit_allowed: bool = True


@dataclass(frozen=True)
class Decision:
    """What to do now. Empty where all is as it should be."""

    target: int
    submit: int = 0
    remove_pending: tuple[str, ...] = ()
    retire: tuple[str, ...] = ()
    reason: str = ""

    @property
    def changes(self) -> bool:
        """Whether anything is to be done."""
        return bool(self.submit or self.remove_pending or self.retire)


def wanted_workers(demand: Demand, target: Target, threads: int) -> int:
    """How many workers the demand asks for, within the target's bounds.

    A task needs a thread whether it waits or runs; pending workers do not lower the number, so a first worker's
    arrival changes nothing.
    """
    if target.fixed is not None:
        return target.fixed
    return min(max(math.ceil(demand.tasks / max(1, threads)), target.minimum), target.maximum)


def decide(demand: Demand | None, supply: Supply, target: Target, settings: PolicySettings) -> Decision:
    """Decide what to submit, remove and retire.

    Args:
        demand: what the scheduler has to run; `None` where it did not answer, which keeps everything as it is.
        supply: the workers there are.
        target: what the user asked for.
        settings: how to behave.

    Returns:
        the decision: pending jobs go before joined workers, busy workers are never chosen while adapting. A fixed
        number that is lower than the busy workers lets busy ones go too, last and fewest: the user asked for it.
    """
    if demand is None:
        return Decision(target=supply.total)
    wanted = wanted_workers(demand, target, settings.threads)
    missing = wanted - supply.total
    if missing > 0:
        return _grow(wanted, missing, demand, supply, target, settings)
    if missing < 0:
        return _shrink(wanted, -missing, demand, supply, target, settings)
    return Decision(target=wanted)


def _grow(
    wanted: int, missing: int, demand: Demand, supply: Supply, target: Target, settings: PolicySettings
) -> Decision:
    # Who asks for a number by name gets it; politeness is for what is asked by arithmetic.
    room = max(0, settings.max_idle_jobs - supply.unstarted) if target.fixed is None else missing
    submit = min(missing, room) if settings.submit_allowed else 0
    if not submit:
        return Decision(target=wanted)
    return Decision(target=wanted, submit=submit, reason=f"{_state(demand, supply)}: +{submit}")


def _shrink(
    wanted: int, surplus: int, demand: Demand, supply: Supply, target: Target, settings: PolicySettings
) -> Decision:
    if target.fixed is None and demand.queued:
        # Tasks wait for a thread: nothing that could serve them goes, whatever the arithmetic of threads says.
        return Decision(target=wanted)
    # The newest go first: the oldest are next to start.
    remove = tuple(reversed(supply.pending))[:surplus]
    surplus -= len(remove)
    residence = 0.0 if target.fixed is not None else settings.residence
    longest_idle = sorted(supply.idle, key=lambda name: (-supply.idle[name], name))
    retire = tuple(name for name in longest_idle if supply.idle[name] >= residence)[:surplus]
    surplus -= len(retire)
    if target.fixed is not None and surplus > 0:
        fewest_tasks = sorted(supply.busy, key=lambda name: (demand.in_hand.get(name, 0), name))
        retire += tuple(fewest_tasks[:surplus])
    gone = len(remove) + len(retire)
    reason = f"{_state(demand, supply)}: -{gone}" if gone else ""
    return Decision(target=wanted, remove_pending=remove, retire=retire, reason=reason)


def _state(demand: Demand, supply: Supply) -> str:
    return f"{demand.queued} queued, {len(supply.busy) + len(supply.idle)} workers, {len(supply.pending)} pending"
