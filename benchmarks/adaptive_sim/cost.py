"""What one decision costs with a million tasks and 10,000 workers."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from random import Random

from .ours import ours
from .pool import JOINED, GroupPool, Job
from .state import GroupState, KindState
from .trace import Group, Pool

TASKS = 1_000_000
WORKERS = 10_000


def situations() -> Iterator[tuple[str, GroupState]]:
    """Groups of this size in which a decision has the most to do."""
    yield "all pending", _state(pending=WORKERS)
    yield "all busy", _state(busy=WORKERS)
    yield "half busy, half idle", _state(busy=WORKERS // 2, idle=WORKERS // 2, queued=0)
    yield "all idle", _state(idle=WORKERS, queued=0)
    yield "half pending, half idle", _state(pending=WORKERS // 2, idle=WORKERS // 2, queued=0)


def decision_seconds(repeats: int = 7) -> float:
    """Seconds of one decision, its words for demand and supply included: the median in the worst situation."""
    worst = 0.0
    for _, state in situations():
        policy = ours(state.group)
        times = []
        for _ in range(repeats):
            before = time.perf_counter()
            policy.decide(state, now=1000.0)
            times.append(time.perf_counter() - before)
        worst = max(worst, sorted(times)[repeats // 2])
    return worst


def _state(pending: int = 0, busy: int = 0, idle: int = 0, queued: int = TASKS) -> GroupState:
    group = Group(maximum=WORKERS)
    state = GroupState(group, GroupPool(group, Pool(), seed=0), [0], seed=0)
    # A heap that holds but zeros is one.
    state.queue = [0] * queued
    # Durations are known, and some hundred tasks wait for others: all that a decision may reckon with.
    kind = state.kinds[0] = KindState(queued=queued, running=dict.fromkeys(range(busy), 0.0))
    for _ in range(100):
        kind.ended(60.0)
    state.coming.update({bucket: 10 for bucket in range(100, 140)})
    state.waits = [float(wait) for wait in range(100)]
    random = Random(0)
    for number in range(pending + busy + idle):
        job = Job(f"worker-{number}", number, 0.0)
        if number < pending:
            state.pending[job.name] = job
            state.unstarted += 1
            continue
        job.state, job.idle_since = JOINED, random.uniform(900, 1000)
        job.started = math.nan
        state.joined[job.name] = job
        if number < pending + busy:
            state.in_hand[job.name] = 1
        else:
            state.idle[job.name] = job
    return state
