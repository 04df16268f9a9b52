"""A Dask scheduler and workers in this process, with the demand plugin: for tests of what is counted."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import dask
from distributed import Client, Scheduler, Worker

from prefect_htcdask.scheduler.plugin import PLUGIN_NAME, DemandPlugin
from prefect_htcdask.scheduler.worker_groups import group_for

GATES: dict[int, threading.Event] = {}
"""What tasks wait for: workers are threads of this process, so that a test opens a gate and the task goes on."""

OFFERS = {
    "cpu": {"htcdask-group-cpu": 2},
    "gpu": {"htcdask-group-gpu": 4, "GPU": 1},
}
"""What two worker groups offer."""


def gate(number: int) -> threading.Event:
    """The gate of this number."""
    return GATES.setdefault(number, threading.Event())


def wait(number: int, *inputs: Any) -> int:
    """Waits for its gate."""
    assert gate(number).wait(30)
    return number


_CONFIG = {
    "distributed.scheduler.work-stealing-interval": "20ms",
    # This process is large before its workers have anything; and one that a test paused stays so.
    **{f"distributed.worker.memory.{what}": False for what in ("target", "spill", "pause")},
}


class _Worker(Worker):
    """Closes without waiting for its threads.

    Dask joins them with a lock held that all workers of a process share (`distributed.threadpoolexecutor`), and a
    thread that is about to secede waits for that lock: both for 30 s, and all other threads that secede with them.
    """

    async def close(self, timeout: float = 30, executor_wait: bool = False, *args: Any, **kwargs: Any) -> str | None:
        """See `Worker.close`."""
        return await super().close(timeout, False, *args, **kwargs)


@dataclass
class Cluster:
    """A scheduler with the plugin, a client, and workers to add and take."""

    scheduler: Scheduler
    client: Client
    workers: list[Worker] = field(default_factory=list)
    started: int = 0

    @property
    def plugin(self) -> Any:
        """The plugin that is installed now."""
        return self.scheduler.plugins[PLUGIN_NAME]

    async def add_worker(
        self, nthreads: int = 1, resources: Mapping[str, float] | None = None, **kwargs: Any
    ) -> Worker:
        """Start a worker named as ours are."""
        self.started += 1
        kwargs.setdefault("name", f"htcdask-{self.started}.0")
        worker = await _Worker(
            self.scheduler.address, nthreads=nthreads, resources=resources or {}, dashboard=False, **kwargs
        )
        self.workers.append(worker)
        address = worker.address
        # A worker joins first and says that it runs then; it may be gone by then, too.
        await self.until(
            lambda: address not in self.scheduler.workers or self.scheduler.workers[address] in self.scheduler.running,
            "the worker running",
        )
        return worker

    async def demand(self) -> dict[str, Any]:
        """The plugin's answer to its owner."""
        answer: dict[str, Any] = await self.plugin.demand(self.plugin.owner, self.plugin.epoch)
        assert answer["status"] == "ok"
        return answer

    def tasks_told(self) -> str:
        """State, worker and recent history of each unfinished task, at the scheduler and on its worker."""
        lines = []
        for task in self.scheduler.tasks.values():
            if task.state in ("memory", "erred", "released", "forgotten"):
                continue
            address = task.processing_on.address if task.processing_on else None
            lines.append(f"{task.key}: {task.state} on {address}, waiting on {task.waiting_on}")
            lines += [f"    scheduler: {event}" for event in self.scheduler.story(task.key)[-6:]]
            for worker in self.workers:
                if task.key in worker.state.tasks:
                    lines.append(f"    {worker.address} ({worker.status.name}): {worker.state.tasks[task.key]}")
                    lines += [f"        {event}" for event in worker.state.story(task.key)[-6:]]
        return "\n".join(lines)

    async def until(self, condition: Callable[[], Any], what: str) -> None:
        """Let things go on until a condition holds; fails after 20 s, and tells of the tasks that there are."""
        deadline = asyncio.get_running_loop().time() + 20
        while not condition():
            if asyncio.get_running_loop().time() > deadline:
                raise AssertionError(f"not within 20 s: {what}\n{self.tasks_told()}")
            await asyncio.sleep(0.01)


@asynccontextmanager
async def dask_cluster(
    offers: Mapping[str, Mapping[str, float]] | None = None, config: Mapping[str, Any] | None = None
) -> AsyncIterator[Cluster]:
    """A cluster without workers yet, whose plugin has been claimed."""
    GATES.clear()
    async with AsyncExitStack() as stack:
        stack.enter_context(dask.config.set({**_CONFIG, **(config or {})}))
        scheduler = await stack.enter_async_context(
            Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0", dashboard=False)
        )
        client = await stack.enter_async_context(Client(scheduler.address, asynchronous=True, set_as_default=False))
        cluster = Cluster(scheduler, client)
        await scheduler.register_scheduler_plugin(DemandPlugin(0, offers), idempotent=True)
        await cluster.plugin.claim("test")
        try:
            yield cluster
        finally:
            for event in GATES.values():
                event.set()
            for worker in cluster.workers:
                await worker.close(nanny=False)


def recount(scheduler: Scheduler, offers: Mapping[str, Mapping[str, float]] | None) -> dict[str, Any]:
    """What the counts must be, from the scheduler's tasks alone."""

    def group(task: Any) -> tuple[bool, str]:
        if task.worker_restrictions and not task.loose_restrictions:
            return False, f"worker={min(task.worker_restrictions)}"
        if not offers:
            return True, "default"
        asked = task.resource_restrictions
        name = group_for(asked, offers)
        return (True, name) if name else (False, ", ".join(f"{key}={asked[key]:g}" for key in sorted(asked)))

    queued, coming, unmatched = Counter[str](), Counter[str](), Counter[str]()
    kinds = Counter[tuple[str, str, frozenset[Any]]]()
    for task in scheduler.tasks.values():
        served, name = group(task)
        if task.state in ("queued", "no-worker"):
            (queued if served else unmatched)[name] += 1
        if task.state in ("queued", "no-worker", "processing"):
            kinds[name, task.group.prefix.name, frozenset((task.resource_restrictions or {}).items())] += 1
        waits = task.waiting_on if task.state == "waiting" else None
        if waits and served and all(needed.state == "processing" for needed in waits):
            coming[name] += 1
    return {"queued": +queued, "coming": +coming, "unmatched": +unmatched, "kinds": +kinds}


def counted(counter: Any) -> dict[str, Any]:
    """What was counted, in the same form; and that the sums agree with the kinds of tasks."""
    every = [*counter.kinds._plain.values(), *counter.kinds.restricted.values()]
    for group in (*counter.kinds.groups.values(), *counter.kinds.unmatched.values()):
        mine = [kind for kind in every if kind.group is group]
        assert group.work == sum(kind.mean * kind.count for kind in mine if kind.known)
        assert group.unknown == sum(kind.count for kind in mine if not kind.known)
        assert all(count > 0 for count in group.coming.values())
    kinds = Counter[tuple[str, str, frozenset[Any]]]()
    for kind in every:
        kinds[kind.group.name, kind.name, frozenset(kind.resources.items())] += kind.count
    groups = counter.kinds.groups.items()
    return {
        "queued": +Counter({name: group.queued for name, group in groups}),
        "coming": +Counter({name: sum(group.coming.values()) for name, group in groups}),
        "unmatched": Counter(counter.kinds.unserved()),
        "kinds": +kinds,
    }
