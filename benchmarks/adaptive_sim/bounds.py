"""What no policy can do better.

- The makespan of a pool with all `maximum` workers asked for at time zero (same waits, same evictions) is that of the
  fixed cluster in the simulation itself: the yardstick for makespans. A greedy scheduler's makespan is not monotone in
  the number of workers (Graham, 1969), so a lucky order can be a little faster than it.
- `makespan_floor` is what even luck cannot beat.
- `worker_seconds_floor` is the worker-seconds of the tasks alone: task-seconds / threads.
"""

from __future__ import annotations

from .pool import cycle_at, cycle_phase, seat_waits
from .trace import Group, Trace, Wave


def worker_seconds_floor(trace: Trace) -> float:
    """Sum over the groups of task-seconds / threads."""
    threads = {group.name: group.threads for group in trace.groups}
    per_kind = [threads[kind.group] for kind in trace.kinds]
    return sum(seconds / per_kind[kind] for seconds, kind in zip(trace.durations, trace.kind_of, strict=True))


def arrivals(trace: Trace, group: Group, seed: int) -> list[float]:
    """When the workers join of a group that was asked for at time zero, earliest first: without evictions.

    The one in seat s joins at a_s = c(w_s) + boot, where w_s is the seat's wait and c(w) the first negotiation cycle
    that is not before w. No policy has more than |{s: a_s <= t}| workers, nor than the pool's capacity, at time t.
    """
    phase = cycle_phase(trace.pool, seed)
    at = [cycle_at(wait, phase, trace.pool.cycle) + trace.pool.boot for wait in seat_waits(group, seed)]
    return sorted(at)[: group.at_once]


def makespan_floor(trace: Trace, seed: int) -> float:
    """A time before which no policy ends.

    Wave by wave, as each begins no sooner than the one before can end. With a_1 <= a_2 <= ... the arrivals of a
    group's workers, k its threads and r a time of release, the end T of a wave is not before

    - path: max(r, a_1) + P, with P the longest chain of dependents of a task released at r, and a_1 its own group's;
    - area: the T at which sum over i of k max(0, T - max(r, a_i)) = W, the group's task-seconds released at r or later.
    """
    joined = {group.name: arrivals(trace, group, seed) for group in trace.groups}
    chains = longest_chains(trace)
    end = 0.0
    for wave in trace.waves:
        begin = end + wave.pause
        end = max(begin, _path(trace, wave, begin, joined, chains), _area(trace, wave, begin, joined))
    return end


def longest_chains(trace: Trace) -> list[float]:
    """Seconds from the beginning of each task to the end of the longest chain of its dependents.

    Raises:
        ValueError: a dependent has a lower number than what it needs.
    """
    chains = list(trace.durations)
    for task in sorted(trace.dependents, reverse=True):
        if min(trace.dependents[task]) <= task:
            raise ValueError(f"trace {trace.name}: task {task} has a dependent that was added before it")
        chains[task] += max(chains[dependent] for dependent in trace.dependents[task])
    return chains


def _path(trace: Trace, wave: Wave, begin: float, joined: dict[str, list[float]], chains: list[float]) -> float:
    first = [joined[kind.group][0] for kind in trace.kinds]
    return max(
        max(begin + offset, first[trace.kind_of[task]]) + chains[task]
        for offset, start, stop in wave.releases
        for task in range(start, stop)
    )


def _area(trace: Trace, wave: Wave, begin: float, joined: dict[str, list[float]]) -> float:
    latest = 0.0
    work = {group.name: 0.0 for group in trace.groups}
    for offset, start, stop in sorted(wave.releases, reverse=True):
        for task in range(start, stop):
            work[trace.kinds[trace.kind_of[task]].group] += trace.durations[task]
        for group in trace.groups:
            if work[group.name]:
                latest = max(latest, _done_at(work[group.name] / group.threads, begin + offset, joined[group.name]))
    return latest


def _done_at(work: float, release: float, joined: list[float]) -> float:
    """When workers that join at these times, ascending, have done so many worker-seconds from the release on."""
    began = 0.0
    for count, at in enumerate(joined, 1):
        began += max(at, release)
        end = (work + began) / count
        if count == len(joined) or end <= joined[count]:
            return end
    raise ValueError("a group has no workers")
