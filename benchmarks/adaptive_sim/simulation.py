"""The simulation: a heap of events, and what each does.

A task needs a thread of a worker of its group. Ready tasks wait on the scheduler and go to the first thread that is
free (Dask's queuing, with the prefetched task of a worker saturation above 1 left out: stealing would move it). Results
are collected at once and outlive their worker. What a policy orders takes effect at once.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .forecast import Forecast
from .pool import BOOTING, JOINED, WAITING, GroupPool, Job
from .state import GroupPolicy, GroupState, KindState, Policy
from .trace import Trace

FINISH, RELEASE, CYCLE, JOIN, EVICT, LOOK = range(6)

INTERVAL = 1.0
"""Seconds between two looks of a policy: `adaptive.interval`, and `distributed.adaptive.interval`."""

LONGEST = 30 * 86400.0
"""Seconds after which a flow that is not over will never be."""


@dataclass
class Outcome:
    """How a flow went.

    Attributes:
        makespan: seconds from its first task's submission to its last one's end.
        worker_seconds: from each job's start to its end, which is the flow's end at the latest.
        busy_removed: workers that the policy removed with tasks in hand.
        evictions: of running workers, by the pool.
        lost: task runs that ended with their worker.
        jobs: worker jobs submitted.
        peak: workers at once.
        looks: decisions made.
        look_seconds: the policy's own time in all of them, on this machine.
        starts: times that each task was started.
        ends: times that each task was completed.
    """

    makespan: float = 0.0
    worker_seconds: float = 0.0
    busy_removed: int = 0
    evictions: int = 0
    lost: int = 0
    jobs: int = 0
    peak: int = 0
    looks: int = 0
    look_seconds: float = 0.0
    starts: bytearray = b""  # type: ignore[assignment]
    ends: bytearray = b""  # type: ignore[assignment]


class Simulation:
    """One flow under one policy.

    Args:
        trace: its tasks, and the pool.
        policy: makes the policy of each group.
        seed: of the pool's waits and evictions, and of Dask's choice among free workers.
    """

    def __init__(self, trace: Trace, policy: Policy, seed: int = 0) -> None:
        self.trace = trace
        self.now = 0.0
        self.events: list[tuple[Any, ...]] = []
        self.sequence = 0
        self.states = {
            group.name: GroupState(group, GroupPool(group, trace.pool, seed), trace.kind_of, seed)
            for group in trace.groups
        }
        self.policies: dict[str, GroupPolicy] = {group.name: policy(group) for group in trace.groups}
        self.kinds = [KindState() for _ in trace.kinds]
        for number, kind in enumerate(trace.kinds):
            self.states[kind.group].kinds[number] = self.kinds[number]
        self.state_of_kind = [self.states[kind.group] for kind in trace.kinds]
        # To be submitted is one more thing that a task waits for.
        # Without dependents there is nothing to foresee, and a million tasks to keep no book of.
        self.forecast = Forecast(trace) if trace.dependents else None
        if self.forecast is not None:
            for name, state in self.states.items():
                state.coming = self.forecast.coming[name]
        self.needs = [count + 1 for count in trace.dependencies()]
        self.wave = -1
        self.left_in_wave = 0
        self.look_planned = math.inf
        self.beats = 0
        self.outcome = Outcome(starts=bytearray(trace.tasks), ends=bytearray(trace.tasks))

    def push(self, at: float, *event: Any) -> None:
        """Plan an event."""
        self.sequence += 1
        heapq.heappush(self.events, (at, self.sequence, *event))

    def run(self) -> Outcome:
        """Run the flow to its end.

        Raises:
            RuntimeError: it never ends, since the policy has too few workers for ever.
        """
        self.next_wave()
        while self.left_in_wave or self.wave < len(self.trace.waves):
            if not self.events or self.now > LONGEST:
                raise RuntimeError(f"trace {self.trace.name}: tasks are left, and nothing will run them")
            at, _, what, *details = heapq.heappop(self.events)
            self.now = at
            if what == FINISH:
                self.finish(*details)
            elif what == LOOK:
                if at == self.look_planned:
                    self.look_planned = math.inf
                    self.look()
                continue
            elif what == RELEASE:
                self.release(*details)
            elif what == CYCLE:
                self.negotiate(*details)
            elif what == JOIN:
                self.join(*details)
            elif what == EVICT:
                self.evict(*details)
            if self.look_planned > at + INTERVAL:
                self.plan_look(at)
        return self.close()

    def plan_look(self, at: float) -> None:
        """Have the policies look at the first beat that is not before a time, and not twice in one."""
        beat = max(math.ceil(at / INTERVAL), self.beats) * INTERVAL
        if beat < self.look_planned:
            self.look_planned = beat
            self.push(beat, LOOK)

    # Tasks

    def next_wave(self) -> None:
        """The user submits again, or is content."""
        self.wave += 1
        if self.wave == len(self.trace.waves):
            return
        wave = self.trace.waves[self.wave]
        self.left_in_wave = sum(end - first for _, first, end in wave.releases)
        for offset, first, end in wave.releases:
            self.push(self.now + wave.pause + offset, RELEASE, first, end)

    def release(self, first: int, end: int) -> None:
        """Tasks are submitted."""
        for state in self.less_needed(range(first, end)):
            self.dispatch(state)

    def less_needed(self, tasks: Iterable[int]) -> list[GroupState]:
        """One thing that these tasks needed is there; returns the groups that have more to run now."""
        needs, kind_of = self.needs, self.trace.kind_of
        touched: dict[str, GroupState] = {}
        for task in tasks:
            needs[task] -= 1
            if not needs[task]:
                state = self.state_of_kind[kind_of[task]]
                state.ready(task)
                if self.forecast is not None:
                    self.forecast.ready(task)
                touched[state.group.name] = state
        return list(touched.values())

    def dispatch(self, state: GroupState) -> None:
        """Give queued tasks to free threads."""
        queue, free = state.queue, state.free
        while queue:
            job = free.choose()
            if job is None:
                return
            count = len(job.tasks)
            free.discard(job, count)
            if not count:
                del state.idle[job.name]
            state.in_hand[job.name] = count + 1
            if count + 1 < free.threads:
                free.add(job, count + 1)
            self.start(job, state.next_task())

    def start(self, job: Job, task: int) -> None:
        """A worker begins a task."""
        job.tasks.add(task)
        self.outcome.starts[task] += 1
        self.kinds[self.trace.kind_of[task]].running[task] = self.now
        self.sequence += 1
        at = self.now + self.trace.durations[task]
        if self.forecast is not None:
            self.forecast.began(task, self.now)
        heapq.heappush(self.events, (at, self.sequence, FINISH, job, job.run, task))

    def finish(self, job: Job, run: int, task: int) -> None:
        """A task ends, unless its worker has gone meanwhile."""
        if job.run != run or job.state != JOINED:
            return
        number = self.trace.kind_of[task]
        kind, state = self.kinds[number], self.state_of_kind[number]
        seconds = self.now - kind.running.pop(task)
        kind.ended(seconds)
        if self.forecast is not None:
            self.forecast.ended(number, seconds, kind.mean)
        self.outcome.ends[task] += 1
        job.tasks.discard(task)
        more = self.less_needed(self.trace.dependents[task]) if task in self.trace.dependents else []
        if state.queue:
            self.start(job, state.next_task())
        else:
            count = len(job.tasks)
            state.free.discard(job, count + 1)
            state.free.add(job, count)
            if count:
                state.in_hand[job.name] = count
            else:
                del state.in_hand[job.name]
                state.idle[job.name] = job
                job.idle_since = self.now
        for touched in more:
            self.dispatch(touched)
        self.left_in_wave -= 1
        if not self.left_in_wave:
            self.next_wave()

    # Workers

    def plan_cycle(self, state: GroupState) -> None:
        """Have the pool negotiate for a group when it may start a job."""
        at = state.pool.next_cycle(self.now)
        if at < math.inf and (state.cycle_planned <= self.now or at < state.cycle_planned):
            state.cycle_planned = at
            self.push(at, CYCLE, state)

    def negotiate(self, state: GroupState) -> None:
        """Jobs start."""
        for job, evicted_after in state.pool.negotiate(self.now):
            state.unstarted -= 1
            state.waits.append(self.now - job.submitted)
            self.push(self.now + self.trace.pool.boot, JOIN, state, job, job.run)
            if evicted_after < math.inf:
                self.push(self.now + evicted_after, EVICT, state, job, job.run)
        self.outcome.peak = max(self.outcome.peak, sum(each.pool.running for each in self.states.values()))
        self.plan_cycle(state)

    def join(self, state: GroupState, job: Job, run: int) -> None:
        """A worker joins the scheduler, unless its job has ended meanwhile."""
        if job.run != run or job.state != BOOTING:
            return
        del state.pending[job.name]
        job.state, job.idle_since = JOINED, self.now
        state.joined[job.name] = state.idle[job.name] = job
        state.free.add(job, 0)
        self.dispatch(state)

    def evict(self, state: GroupState, job: Job, run: int) -> None:
        """The pool takes a slot back; HTCondor puts the job into the queue again."""
        if job.run != run or job.state not in (BOOTING, JOINED):
            return
        self.outcome.evictions += 1
        self.leave(state, job)
        state.pool.evict(job, self.now)
        state.pending[job.name] = job
        state.unstarted += 1
        self.dispatch(state)
        self.plan_cycle(state)

    def leave(self, state: GroupState, job: Job) -> None:
        """A worker is at the scheduler no more; its tasks have to be run again."""
        if job.state != JOINED:
            del state.pending[job.name]
            state.unstarted -= job.state == WAITING
            return
        state.free.discard(job, len(job.tasks))
        del state.joined[job.name]
        state.idle.pop(job.name, None)
        state.in_hand.pop(job.name, None)
        self.outcome.lost += len(job.tasks)
        for task in sorted(job.tasks):
            del self.kinds[self.trace.kind_of[task]].running[task]
            if self.forecast is not None:
                self.forecast.lost(task)
            state.ready(task)

    # The policy

    def look(self) -> None:
        """Every group's policy looks, and its orders are carried out."""
        again = math.inf
        self.beats = round(self.now / INTERVAL) + 1
        for name, state in self.states.items():
            before = time.perf_counter()
            orders = self.policies[name].look(state, self.now)
            self.outcome.look_seconds += time.perf_counter() - before
            self.outcome.looks += 1
            jobs = [state.pending.get(worker) or state.joined[worker] for worker in orders.remove]
            for job in jobs:
                self.outcome.busy_removed += bool(job.tasks)
                self.leave(state, job)
                state.pool.remove(job, self.now)
            for _ in range(orders.submit):
                job = state.pool.submit(self.now)
                state.pending[job.name] = job
                state.unstarted += 1
            self.outcome.jobs += orders.submit
            if jobs:
                self.dispatch(state)
            if jobs or orders.submit:
                self.plan_cycle(state)
            if orders.look_again is not None:
                again = min(again, max(orders.look_again, self.now + INTERVAL))
        if again < math.inf:
            self.plan_look(again)

    def close(self) -> Outcome:
        """The flow is over: so are its workers."""
        outcome = self.outcome
        outcome.makespan = self.now
        for state in self.states.values():
            for job in [*state.pending.values(), *state.joined.values()]:
                state.pool.remove(job, self.now)
            outcome.worker_seconds += state.pool.worker_seconds
        return outcome


def simulate(trace: Trace, policy: Policy, seed: int = 0) -> Outcome:
    """Run a flow under a policy; the same for the same arguments."""
    return Simulation(trace, policy, seed).run()
