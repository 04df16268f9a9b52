"""What a policy sees of one worker group: the scheduler's tasks and workers, the schedd's jobs."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from .pool import GroupPool, Job
from .trace import Group

WINDOW = 100
"""Tasks that make a kind's mean duration."""


@dataclass
class KindState:
    """What the scheduler knows of a kind of task, as `distributed.scheduler.TaskPrefix` does.

    Attributes:
        running: tasks in hand and when they began, oldest first.
        queued: tasks that are ready and have no thread.
        average: Dask's moving average of durations; -1: unknown.
        done: tasks that have ended.
        seconds: how long these ran in all.
        mean: of the last hundred or so, as `prefect_htcdask.scheduler.demand` keeps it.
    """

    running: dict[int, float] = field(default_factory=dict)
    queued: int = 0
    average: float = -1.0
    done: int = 0
    seconds: float = 0.0
    mean: float = 0.0

    def ended(self, seconds: float) -> None:
        """A task has ended (`TaskPrefix.add_duration`)."""
        self.done += 1
        self.seconds += seconds
        self.mean += (seconds - self.mean) / min(self.done, WINDOW)
        self.average = seconds if self.average < 0 else 0.5 * seconds + 0.5 * self.average


class FreeWorkers:
    """Workers with a free thread, by the number of tasks in hand.

    Dask gives a queued task to a worker with the fewest, whichever of those its set happens to hold first: here one is
    drawn, for no policy may build on the order.
    """

    def __init__(self, threads: int, seed: int) -> None:
        self.threads = threads
        self.random = Random(f"free/{seed}").random
        self.by_count: list[list[Job]] = [[] for _ in range(threads)]
        self.place: dict[Job, int] = {}

    def add(self, job: Job, count: int) -> None:
        """A worker has now so many tasks in hand, fewer than its threads."""
        jobs = self.by_count[count]
        self.place[job] = len(jobs)
        jobs.append(job)

    def discard(self, job: Job, count: int) -> None:
        """A worker that had so many tasks in hand has this number no more."""
        if count >= self.threads:
            return
        jobs = self.by_count[count]
        place = self.place.pop(job)
        last = jobs.pop()
        if last is not job:
            jobs[place] = last
            self.place[last] = place

    def choose(self) -> Job | None:
        """A worker for the next task."""
        for jobs in self.by_count:
            if jobs:
                return jobs[int(self.random() * len(jobs))]
        return None


class GroupState:
    """One worker group in the middle of a simulation; for policies to read.

    Attributes:
        group: the group's limits.
        pool: its jobs in the pool.
        queue: a heap of the ready tasks that no worker has, in Dask's order of priority: the task's number.
        in_hand: tasks in hand, by the name of each joined worker that has some.
        idle: joined workers with no task in hand, by name.
        pending: jobs that wait or whose worker has not joined, by name, in the order of submission.
        unstarted: how many of these wait.
        kinds: the kinds of this group's tasks, by index.
        kind_of: the index of each task's kind.
        coming: the number of tasks forecast to be ready, by the bucket of the time (see `forecast`).
        waits: seconds from submission to start of each job that has started, in the order of the starts.
    """

    def __init__(self, group: Group, pool: GroupPool, kind_of: list[int], seed: int) -> None:
        self.group, self.pool, self.kind_of = group, pool, kind_of
        self.queue: list[int] = []
        self.in_hand: dict[str, int] = {}
        self.idle: dict[str, Job] = {}
        self.pending: dict[str, Job] = {}
        self.joined: dict[str, Job] = {}
        self.unstarted = 0
        self.kinds: dict[int, KindState] = {}
        self.coming: Counter[int] = Counter()
        self.waits: list[float] = []
        self.free = FreeWorkers(group.threads, seed)
        self.cycle_planned = -1.0

    @property
    def total(self) -> int:
        """Workers there are or will be."""
        return len(self.pending) + len(self.joined)

    def ready(self, task: int) -> None:
        """A task waits for a thread."""
        self.kinds[self.kind_of[task]].queued += 1
        heapq.heappush(self.queue, task)

    def next_task(self) -> int:
        """Takes the first task from the queue."""
        task = heapq.heappop(self.queue)
        self.kinds[self.kind_of[task]].queued -= 1
        return task


@dataclass(frozen=True)
class Orders:
    """What a policy wants done in a group.

    Attributes:
        submit: jobs to submit.
        remove: names of jobs to end, whatever their state.
        look_again: the policy may decide otherwise at this time though nothing happens; `None`: it will not.
    """

    submit: int = 0
    remove: Sequence[str] = ()
    look_again: float | None = None


class GroupPolicy(Protocol):
    """Decides for one group in one simulation; may remember."""

    def look(self, state: GroupState, now: float) -> Orders:
        """Decide, at a time in seconds since the flow began."""


class Policy(Protocol):
    """Makes a `GroupPolicy` for each group of a trace."""

    def __call__(self, group: Group) -> GroupPolicy:
        """A fresh one."""
