"""A trace: the tasks that a flow has, and the pool that it meets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Group:
    """A worker group, and what the pool has for it.

    Attributes:
        name: of the group.
        threads: tasks that one worker runs at once.
        maximum: workers at most.
        capacity: slots that the pool gives at once at most; `None`: as many as are asked for.
        wait_median: seconds that a job typically waits for a slot to come free, before the negotiation cycle that
            gives it to the job.
        wait_sigma: spread of that wait (lognormal); 0: always the median.
    """

    name: str = "cpu"
    threads: int = 1
    maximum: int = 100
    capacity: int | None = None
    wait_median: float = 45.0
    wait_sigma: float = 0.8

    @property
    def at_once(self) -> int:
        """Workers that can run at once."""
        return self.maximum if self.capacity is None else min(self.maximum, self.capacity)


@dataclass(frozen=True)
class Pool:
    """What all groups of the pool have in common.

    Attributes:
        cycle: seconds between two negotiation cycles (HTCondor's `NEGOTIATOR_INTERVAL` is 60 by default).
        boot: seconds from a job's start until its worker has joined the scheduler.
        eviction_rate: evictions per hour that a worker runs.
    """

    cycle: float = 60.0
    boot: float = 10.0
    eviction_rate: float = 0.05


@dataclass(frozen=True)
class Kind:
    """A kind of task: what Dask calls a prefix, and the worker group it is for."""

    name: str
    group: str = "cpu"


@dataclass(frozen=True)
class Wave:
    """Tasks that the user submits once he has all results of the wave before, and has looked at them for a while.

    Attributes:
        pause: seconds between the last result of the wave before and this one.
        releases: seconds after the wave's beginning at which the tasks from `first` to before `end` are submitted.
    """

    releases: tuple[tuple[float, int, int], ...]
    pause: float = 0.0

    def tasks(self) -> Iterator[int]:
        """The wave's tasks."""
        for _, first, end in self.releases:
            yield from range(first, end)


@dataclass
class Trace:
    """Tasks, numbered from 0.

    Attributes:
        name: of the trace.
        groups: the worker groups.
        kinds: the kinds of task.
        durations: seconds that each task runs.
        kind_of: index into `kinds` of each task.
        dependents: the tasks that need a task's result.
        waves: when the tasks are submitted; each task is in one wave, dependents not in an earlier one.
    """

    name: str
    groups: tuple[Group, ...] = (Group(),)
    kinds: list[Kind] = field(default_factory=list)
    pool: Pool = field(default_factory=Pool)
    durations: list[float] = field(default_factory=list)
    kind_of: list[int] = field(default_factory=list)
    dependents: dict[int, list[int]] = field(default_factory=dict)
    waves: list[Wave] = field(default_factory=list)

    @property
    def tasks(self) -> int:
        """How many tasks there are."""
        return len(self.durations)

    def add(self, kind: str, durations: list[float], group: str = "cpu") -> range:
        """Add tasks of a kind; returns their numbers."""
        wanted = Kind(kind, group)
        if wanted not in self.kinds:
            self.kinds.append(wanted)
        first = self.tasks
        self.durations += durations
        self.kind_of += [self.kinds.index(wanted)] * len(durations)
        return range(first, self.tasks)

    def after(self, needed: int, task: int) -> None:
        """Say that a task needs another's result."""
        self.dependents.setdefault(needed, []).append(task)

    def submit(self, first: int, pause: float = 0.0) -> None:
        """Make the tasks from `first` on the next wave, all submitted at its beginning."""
        self.waves.append(Wave(((0.0, first, self.tasks),), pause))

    def dependencies(self) -> list[int]:
        """How many results each task needs."""
        counts = [0] * self.tasks
        for tasks in self.dependents.values():
            for task in tasks:
                counts[task] += 1
        return counts
