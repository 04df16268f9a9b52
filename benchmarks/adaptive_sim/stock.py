"""Stock adaptive scaling, as `HTCondorCluster.adapt()` of dask-jobqueue does it.

`distributed.deploy.adaptive_core.AdaptiveCore` itself decides here; what it asks of the scheduler and the cluster is
done as `Scheduler.adaptive_target` and `Scheduler.workers_to_close` (distributed/scheduler.py),
`SpecCluster.scale` and `scale_down` (distributed/deploy/spec.py) and `JobQueueCluster` (dask_jobqueue/core.py) do it.

What flatters it: submission and removal take no time, though each is one `condor_submit` or `condor_rm` there; a lost
worker's job is not given up after `lost-worker-timeout` to be submitted anew; and as it knows no resources, each worker
group is a cluster and a scheduler of its own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Coroutine, Iterable
from dataclasses import replace
from hashlib import blake2b
from itertools import islice
from typing import Any

import dask.config
from dask.utils import parse_timedelta
from distributed.deploy.adaptive_core import AdaptiveCore

from .state import GroupState, KindState, Orders
from .trace import Group


def config_seconds(key: str) -> float:
    """A duration from Dask's configuration, which holds its defaults."""
    return float(parse_timedelta(dask.config.get(key)))


class SchedulerView:
    """The scheduler's part: what a group's tasks and workers ask for."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.target_duration = config_seconds("distributed.adaptive.target-duration")
        self.unknown = config_seconds("distributed.scheduler.unknown-task-duration")
        self.longest: dict[int, float] = {}

    def heartbeats(self, state: GroupState, now: float) -> None:
        """Workers report how long their tasks have run (`TaskPrefix.add_exec_time`): a straggler unlearns the mean."""
        for number, kind in state.kinds.items():
            if not kind.running:
                continue
            seconds = now - next(iter(kind.running.values()))
            self.longest[number] = max(seconds, self.longest.get(number, 0.0))
            if seconds > 2 * kind.average:
                kind.average = -1.0

    def duration(self, number: int, kind: KindState) -> float:
        """`SchedulerState._get_prefix_duration`."""
        if kind.average >= 0:
            return kind.average
        return 2 * self.longest[number] if self.longest.get(number) else self.unknown

    def adaptive_target(self, state: GroupState) -> int:
        """`Scheduler.adaptive_target`; no worker is short of memory here."""
        durations = {number: self.duration(number, kind) for number, kind in state.kinds.items()}
        occupancy = sum(durations[number] * len(kind.running) for number, kind in state.kinds.items())
        ready = len(state.queue)
        queued = sum(durations[state.kind_of[task]] for task in islice(state.queue, 100))
        if ready > 100:
            queued *= ready / 100
        cpu = math.ceil((occupancy + queued) / self.target_duration)
        # Its loop over the workers stops early, with the same result.
        cpu = min(cpu, ready + sum(state.in_hand.values()))
        if state.joined:
            cpu = math.ceil(cpu / (self.threads * len(state.joined)) * len(state.joined))
        elif ready:
            cpu = max(1, cpu)
        if cpu >= len(state.joined):
            return cpu
        # `workers_to_close()` with no arguments: all idle ones, while no worker holds data.
        return len(state.joined) - len(state.idle)

    def workers_to_close(self, state: GroupState, target: int) -> list[str]:
        """`Scheduler.workers_to_close(target=target)`: idle workers first, then busy ones."""
        count = max(0, len(state.joined) - target)
        return [*islice(state.idle, count), *islice(state.in_hand, max(0, count - len(state.idle)))]


class Stock(AdaptiveCore):
    """`Adaptive` on a `SpecCluster`, for one group.

    Attributes:
        plan: workers that the cluster means to have.
        observed: workers at the scheduler.
    """

    # AdaptiveCore has them as abstract properties, and the types of its two scale methods swapped.
    plan: set[int] = set()  # type: ignore[assignment]
    observed: set[int] = set()  # type: ignore[assignment]

    def __init__(self, group: Group) -> None:
        super().__init__(
            minimum=0, maximum=group.maximum, wait_count=dask.config.get("distributed.adaptive.wait-count")
        )
        self.scheduler = SchedulerView(group.threads)
        self.tokens = Tokens()
        self.state: GroupState
        self.orders = Orders()
        self.plan: set[int] = set()
        self.observed: set[int] = set()

    def look(self, state: GroupState, now: float) -> Orders:
        """One `adapt()`, which its periodic callback calls every second."""
        self.state, self.orders = state, Orders(look_again=now + 1)
        self.observed = self.tokens.of(state.joined)
        self.plan = self.observed | self.tokens.of(state.pending)
        self.scheduler.heartbeats(state, now)
        run_at_once(self.adapt())
        return self.orders

    @property
    def requested(self) -> set[int]:  # type: ignore[override]
        """Workers that were submitted: all that are planned, as submission takes no time here."""
        return self.plan

    async def target(self) -> int:
        """Ask the scheduler."""
        return self.scheduler.adaptive_target(self.state)

    async def workers_to_close(self, target: int) -> list[int]:
        """Ask the scheduler."""
        return list(self.tokens.of(self.scheduler.workers_to_close(self.state, target)))

    async def scale_up(self, n: int) -> None:  # type: ignore[override]
        """`SpecCluster.scale`: make the number of jobs n."""
        self.orders = replace(self.orders, submit=n - self.state.total)

    async def scale_down(self, workers: Iterable[int]) -> None:  # type: ignore[override]
        """`SpecCluster.scale_down`: pending jobs are removed, workers retired without waiting for their tasks."""
        self.orders = replace(self.orders, remove=self.tokens.names(workers))


class Tokens:
    """Numbers for workers' names, for `AdaptiveCore` takes pending workers in the order of its sets.

    The order of a set of names differs from process to process, that of these numbers does not, and is as arbitrary.
    """

    def __init__(self) -> None:
        self.token: dict[str, int] = {}
        self.name: dict[int, str] = {}

    def of(self, names: Collection[str]) -> set[int]:
        """The tokens of these names."""
        token = self.token
        try:
            return {token[name] for name in names}
        except KeyError:
            for name in names:
                if name not in token:
                    token[name] = int.from_bytes(blake2b(name.encode(), digest_size=7).digest(), "big")
                    self.name[token[name]] = name
            return {token[name] for name in names}

    def names(self, tokens: Iterable[int]) -> list[str]:
        """The names of these tokens."""
        return [self.name[token] for token in tokens]


def run_at_once(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine that waits for nothing, without an event loop."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise RuntimeError("AdaptiveCore.adapt waited for something")
