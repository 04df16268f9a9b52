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

from prefect_htcdask.scheduler.worker_loss import WorkerLossPlugin

SETTLED = 0.1
"""Seconds after which a loss is settled in these tests."""


class Pool:
    """A scheduler, one worker at a time that offers a GPU, and a way to lose it."""

    def __init__(self, scheduler: Scheduler, client: Client, losses: WorkerLossPlugin) -> None:
        self.scheduler, self.client, self.losses = scheduler, client, losses
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

    async def lose_worker_for_good(self) -> None:
        """And wait until it is settled that the loss counts."""
        await self.lose_worker()
        await self.until(lambda: all(loss.counts for of_job in self.losses.losses.values() for loss in of_job))

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
        losses = WorkerLossPlugin(at_once=SETTLED)
        await losses.start(scheduler)
        scheduler.add_plugin(losses)
        made = Pool(scheduler, client, losses)
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
        assert p.marks(futures) == [0, 0, 0, 0, 0], "it is not known yet whether a client is lost with it"
        await p.until(lambda: p.marks(futures) == [1, 0, 0, 0, 0])
        assert p.scheduler.tasks[futures[0].key].prefix.suspicious == 1


async def test_a_task_that_kills_its_workers_is_stopped_and_the_others_are_not() -> None:
    async with pool() as p:
        futures = p.submit(5)
        for n in range(4):
            await p.add_worker()
            await p.until(lambda n=n: len(p.begun) > n)
            await p.lose_worker_for_good()
        assert p.begun == [0, 0, 0, 0]
        with pytest.raises(KilledWorker):
            await futures[0]
        assert p.marks(futures[1:]) == [0, 0, 0, 0]
        p.gate.set()
        await p.add_worker()
        assert await p.client.gather(futures[1:]) == [1, 2, 3, 4]


@pytest.mark.parametrize("told", ["before", "at once", "later"])
async def test_what_the_pool_took_away_is_held_against_no_task(told: str) -> None:
    """HTCondor's word may come before the scheduler misses the worker, or after."""
    async with pool() as p:
        futures = p.submit(3)
        for n in range(6):
            name = await p.add_worker()
            await p.until(lambda n=n: len(p.begun) > n)
            if told == "before":
                await p.losses.pardon([name, "htcdask-7.0-1"])
            await p.lose_worker()
            if told == "later":
                await p.until(lambda: p.marks(futures) == [1, 0, 0])
            if told != "before":
                await p.losses.pardon([name, "htcdask-7.0-1"])
            assert p.marks(futures) == [0, 0, 0]
            await asyncio.sleep(2 * SETTLED)
            assert p.marks(futures) == [0, 0, 0]
        p.gate.set()
        await p.add_worker()
        assert await p.client.gather(futures) == [0, 1, 2]


async def test_a_pardon_is_for_one_worker_once() -> None:
    async with pool() as p:
        futures = p.submit(1)
        name = await p.add_worker()
        await p.until(lambda: p.begun)
        await p.lose_worker_for_good()
        await p.losses.pardon(["htcdask-2.0-0"])
        assert p.marks(futures) == [1]
        await p.losses.pardon([name])
        await p.losses.pardon([name])
        assert p.marks(futures) == [0]
        await p.add_worker()
        await p.until(lambda: len(p.begun) == 2)
        await p.lose_worker_for_good()
        assert p.marks(futures) == [1]


async def test_the_starts_of_a_job_may_be_counted_in_another_way() -> None:
    """A pardon for an earlier start takes back what was marked, and leaves the next loss alone."""
    async with pool() as p:
        futures = p.submit(1)
        for n in range(2):
            await p.add_worker()
            await p.until(lambda n=n: len(p.begun) > n)
            await p.lose_worker_for_good()
        assert p.marks(futures) == [2]
        await p.add_worker()
        await p.until(lambda: len(p.begun) == 3)
        await p.losses.pardon(["htcdask-1.0-0"])
        assert p.marks(futures) == [0]
        await p.lose_worker_for_good()
        assert p.marks(futures) == [1]


async def test_a_worker_that_was_expected_to_leave_marks_nothing() -> None:
    async with pool() as p:
        await p.add_worker()
        futures = p.submit(2)
        await p.until(lambda: p.begun and len(p.scheduler.tasks) == 2)
        await p.scheduler.remove_worker(p.workers[0].address, stimulus_id="left", expected=True)
        assert p.marks(futures) == [0, 0]
        assert p.losses.losses == {} and p.losses.workers == {}
