"""The model pool: jobs wait for a slot and a negotiation cycle, start, are evicted and wait again.

A group has as many *seats* as its maximum of workers. Each has a wait of its own: for so long others use the slot that
a job in this seat will get. A job takes the seat that was free longest. So any policy meets the same pool, whatever
its jobs' number and times, and none has more workers at any time than one that asked for all of them at time zero.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from random import Random

from .trace import Group, Pool

GONE, WAITING, BOOTING, JOINED = range(4)


class Job:
    """A worker job.

    Attributes:
        name: of the job and of its worker.
        seat: index of its seat.
        state: `WAITING`, `BOOTING` (started, but not joined), `JOINED` or `GONE`.
        run: how many times it has started; an event of an earlier run is void.
        submitted: when it began to wait, in seconds; an evicted job waits anew.
        started: when its last run started.
        idle_since: when its last task ended, or when it joined.
        tasks: the tasks in hand.
    """

    __slots__ = ("idle_since", "name", "run", "seat", "started", "state", "submitted", "tasks")

    def __init__(self, name: str, seat: int, now: float) -> None:
        self.name = name
        self.seat = seat
        self.state = WAITING
        self.run = 0
        self.submitted = now
        self.started = math.nan
        self.idle_since = math.nan
        self.tasks: set[int] = set()


class GroupPool:
    """The pool as one group of workers meets it.

    Args:
        group: the group.
        pool: the pool.
        seed: of waits and evictions.
    """

    def __init__(self, group: Group, pool: Pool, seed: int) -> None:
        self.group, self.pool, self.seed = group, pool, seed
        self.waits = seat_waits(group, seed)
        self.phase = cycle_phase(pool, seed)
        self.seats = deque(range(group.maximum))
        self.starts = [0] * group.maximum
        self.running = 0
        self.waiting: list[tuple[float, int, Job]] = []
        self.served: deque[Job] = deque()
        self.number = 0
        self.worker_seconds = 0.0

    def submit(self, now: float) -> Job:
        """A new job, which waits."""
        if not self.seats:
            raise RuntimeError(f"a policy has more than the maximum of {self.group.maximum} jobs of {self.group.name}")
        job = Job(f"{self.group.name}-{self.number}", self.seats.popleft(), now)
        self._wait(job, now)
        return job

    def _wait(self, job: Job, now: float) -> None:
        job.state, job.submitted = WAITING, now
        self.number += 1
        heapq.heappush(self.waiting, (now + self.waits[job.seat], self.number, job))

    def next_cycle(self, now: float) -> float:
        """When the first negotiation cycle after now is that may start a job; infinity where none waits."""
        if self.served and self.running < self.group.at_once:
            wanted = now
        elif self.waiting:
            wanted = max(now, self.waiting[0][0])
        else:
            return math.inf
        cycle = cycle_at(wanted, self.phase, self.pool.cycle)
        return cycle if cycle > now else cycle + self.pool.cycle

    def negotiate(self, now: float) -> list[tuple[Job, float]]:
        """A negotiation cycle: the jobs that start now, each with the seconds until its eviction."""
        while self.waiting and self.waiting[0][0] <= now:
            self.served.append(heapq.heappop(self.waiting)[2])
        started = []
        while self.served and self.running < self.group.at_once:
            job = self.served.popleft()
            if job.state != WAITING:
                continue
            job.state, job.started = BOOTING, now
            job.run += 1
            self.running += 1
            started.append((job, self._eviction(job.seat)))
        return started

    def _eviction(self, seat: int) -> float:
        self.starts[seat] += 1
        if not self.pool.eviction_rate:
            return math.inf
        random = Random(f"eviction/{self.seed}/{self.group.name}/{seat}/{self.starts[seat]}")
        return random.expovariate(self.pool.eviction_rate / 3600)

    def evict(self, job: Job, now: float) -> None:
        """End a job's run; it waits again."""
        self._stop(job, now)
        self._wait(job, now)

    def remove(self, job: Job, now: float) -> None:
        """End a job."""
        if job.state != WAITING:
            self._stop(job, now)
        job.state = GONE
        self.seats.append(job.seat)

    def _stop(self, job: Job, now: float) -> None:
        self.running -= 1
        self.worker_seconds += now - job.started
        job.tasks.clear()


def seat_waits(group: Group, seed: int) -> list[float]:
    """Seconds that a job in each of the group's seats waits until a cycle may start it."""
    random = Random(f"waits/{seed}/{group.name}")
    mu = math.log(group.wait_median) if group.wait_median else -math.inf
    return [
        math.exp(random.normalvariate(mu, group.wait_sigma)) if group.wait_median else 0.0 for _ in range(group.maximum)
    ]


def cycle_phase(pool: Pool, seed: int) -> float:
    """When the first negotiation cycle is: the flow begins anywhere between two of them."""
    return Random(f"phase/{seed}").uniform(0, pool.cycle)


def cycle_at(wanted: float, phase: float, cycle: float) -> float:
    """The first negotiation cycle that is not before `wanted`."""
    at = phase + max(0, math.ceil((wanted - phase) / cycle)) * cycle
    # The sum may be the smaller by a rounding.
    return at if at >= wanted else at + cycle
