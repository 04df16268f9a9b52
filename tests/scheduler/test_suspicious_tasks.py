"""Marks that vanished workers leave on tasks, on a real scheduler and workers in this process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from distributed import Client, KilledWorker, Scheduler, Worker
from distributed.diagnostics.plugin import SchedulerPlugin

from prefect_htcdask.scheduler.suspicious_tasks import SuspiciousTasks


class Plugin(SchedulerPlugin):
    """As the demand plugin does it."""

    name = "suspicion"

    def __init__(self, suspicions: SuspiciousTasks) -> None:
        self.suspicions = suspicions

    def add_worker(self, scheduler: Any, worker: str) -> None:
        self.suspicions.add_worker(scheduler, worker)

    def remove_worker(self, scheduler: Any, worker: str, **_: Any) -> None:
        self.suspicions.remove_worker(scheduler, worker)


class Pool:
    """A scheduler, one worker at a time that offers a GPU, and a way to lose it."""

    def __init__(self, scheduler: Scheduler, client: Client, suspicions: SuspiciousTasks) -> None:
        self.scheduler, self.client, self.suspicions = scheduler, client, suspicions
        self.gate = threading.Event()
        self.begun: list[int] = []
        self.workers: list[Worker] = []

    def submit(self, number: int) -> list[Any]:
        def task(index: int, pool: Any) -> int:
            pool().begun.append(index)
            pool().gate.wait(20)
            return index

        # Tasks that ask for a resource are never queued: all of them are assigned.
        return [
            self.client.submit(task, n, _This(self), resources={"GPU": 1}, pure=False, priority=-n)
            for n in range(number)
        ]

    async def add_worker(self) -> str:
        worker = await Worker(
            self.scheduler.address,
            nthreads=1,
            dashboard=False,
            resources={"GPU": 1},
            name=f"htcdask-1.0-{len(self.workers)}",
        )
        self.workers.append(worker)
        return str(worker.name)

    async def lose_worker(self) -> None:
        """As the scheduler does it when a worker's connection breaks."""
        worker = self.workers[-1]
        await self.scheduler.remove_worker(worker.address, stimulus_id="lost", close=False)
        await worker.close(executor_wait=False, nanny=False)

    async def until(self, condition: Any) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)

    def marks(self, futures: list[Any]) -> list[int]:
        return [self.scheduler.tasks[future.key].suspicious for future in futures]


_pools: dict[int, Pool] = {}


class _This:
    """Refers to a pool of this process, and can be pickled."""

    def __init__(self, pool: Pool) -> None:
        self.number = id(pool)
        _pools[self.number] = pool

    def __call__(self) -> Pool:
        return _pools[self.number]


@asynccontextmanager
async def pool() -> AsyncIterator[Pool]:
    async with AsyncExitStack() as stack:
        scheduler = await stack.enter_async_context(
            Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0", dashboard=False)
        )
        client = await stack.enter_async_context(Client(scheduler.address, asynchronous=True))
        suspicions = SuspiciousTasks()
        scheduler.add_plugin(Plugin(suspicions))
        made = Pool(scheduler, client, suspicions)
        try:
            yield made
        finally:
            made.gate.set()
            _pools.pop(id(made), None)
            for worker in made.workers:
                await worker.close(executor_wait=False, nanny=False)


async def test_only_the_task_in_hand_stays_marked() -> None:
    async with pool() as p:
        await p.add_worker()
        futures = p.submit(5)
        await p.until(lambda: p.begun)
        await p.until(lambda: len(p.scheduler.workers[p.workers[0].address].processing) == 5)
        await p.lose_worker()
        assert p.marks(futures) == [1, 0, 0, 0, 0]
        assert p.scheduler.tasks[futures[0].key].prefix.suspicious == 1


async def test_a_task_that_kills_its_workers_is_stopped_and_the_others_are_not() -> None:
    async with pool() as p:
        futures = p.submit(5)
        for n in range(4):
            await p.add_worker()
            await p.until(lambda n=n: len(p.begun) > n)
            await p.lose_worker()
        assert p.begun == [0, 0, 0, 0]
        with pytest.raises(KilledWorker):
            await futures[0]
        assert p.marks(futures[1:]) == [0, 0, 0, 0]
        p.gate.set()
        await p.add_worker()
        assert await p.client.gather(futures[1:]) == [1, 2, 3, 4]


@pytest.mark.parametrize("told_first", [True, False])
async def test_what_the_pool_took_away_is_held_against_no_task(told_first: bool) -> None:
    """HTCondor's word may come before the scheduler misses the worker, or after."""
    async with pool() as p:
        futures = p.submit(3)
        for n in range(6):
            name = await p.add_worker()
            await p.until(lambda n=n: len(p.begun) > n)
            if told_first:
                p.suspicions.pardon(p.scheduler, [name, "htcdask-7.0-1"])
            await p.lose_worker()
            if not told_first:
                assert p.marks(futures) == [1, 0, 0]
                p.suspicions.pardon(p.scheduler, [name, "htcdask-7.0-1"])
            assert p.marks(futures) == [0, 0, 0]
        p.gate.set()
        await p.add_worker()
        assert await p.client.gather(futures) == [0, 1, 2]


async def test_a_pardon_is_for_one_worker_once() -> None:
    async with pool() as p:
        futures = p.submit(1)
        name = await p.add_worker()
        await p.until(lambda: p.begun)
        await p.lose_worker()
        p.suspicions.pardon(p.scheduler, ["htcdask-2.0-0"])
        assert p.marks(futures) == [1]
        p.suspicions.pardon(p.scheduler, [name])
        p.suspicions.pardon(p.scheduler, [name])
        assert p.marks(futures) == [0]
        await p.add_worker()
        await p.until(lambda: len(p.begun) == 2)
        await p.lose_worker()
        assert p.marks(futures) == [1]


async def test_the_starts_of_a_job_may_be_counted_in_another_way() -> None:
    """A pardon for an earlier start takes back what was marked, and leaves the next loss alone."""
    async with pool() as p:
        futures = p.submit(1)
        for n in range(2):
            await p.add_worker()
            await p.until(lambda n=n: len(p.begun) > n)
            await p.lose_worker()
        assert p.marks(futures) == [2]
        await p.add_worker()
        await p.until(lambda: len(p.begun) == 3)
        p.suspicions.pardon(p.scheduler, ["htcdask-1.0-0"])
        assert p.marks(futures) == [0]
        await p.lose_worker()
        assert p.marks(futures) == [1]


async def test_a_worker_that_was_expected_to_leave_marks_nothing() -> None:
    async with pool() as p:
        await p.add_worker()
        futures = p.submit(2)
        await p.until(lambda: p.begun and len(p.scheduler.tasks) == 2)
        await p.scheduler.remove_worker(p.workers[0].address, stimulus_id="left", expected=True)
        assert p.marks(futures) == [0, 0]
        assert p.suspicions._marked == {} and p.suspicions._workers == {}
