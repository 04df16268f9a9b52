"""How the scheduler's plugin retires workers: on a real scheduler with workers in this process."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from distributed.comm.core import CommClosedError
from distributed.core import Status

from prefect_htcdask.scheduler.plugin import DRAIN
from tests.support.dask_cluster import dask_cluster, gate, wait


async def test_retirement_moves_results_and_leaves_a_busy_worker_alone() -> None:
    async with dask_cluster() as cluster:
        holder, busy, empty = [await cluster.add_worker(1) for _ in range(3)]
        client = cluster.client
        gate(1).set()
        kept = client.submit(wait, 1, workers=[holder.address])
        await kept
        running = client.submit(wait, 2, workers=[busy.address], allow_other_workers=True)
        await cluster.until(lambda: cluster.scheduler.workers[busy.address].processing, "in hand")
        names = [holder.name, busy.name, empty.name, "htcdask-99.0"]
        assert sorted(await cluster.plugin.retire(names, idle_only=True)) == [holder.name, empty.name]
        assert [ws.name for ws in cluster.scheduler.workers.values()] == [busy.name]
        assert cluster.scheduler.workers[busy.address].status is Status.running
        assert await client.gather(kept) == 1
        assert [ts.state for ts in cluster.scheduler.tasks.values()].count("memory") == 1
        # Told to go all the same, it ends its task first, and gets no other.
        told: list[Any] = []
        busy.stream_handlers[DRAIN] = lambda **message: told.append(message)
        await cluster.add_worker(1)
        assert await cluster.plugin.retire([busy.name]) == [busy.name]
        later = client.map(wait, [1] * 3, pure=False)
        await client.gather(later)
        assert told and busy.name in (await cluster.demand())["closing"]
        assert await cluster.plugin.retire([busy.name]) == [], "it is leaving already"
        del later
        gate(2).set()
        assert await client.gather([kept, running]) == [1, 2]
        assert cluster.scheduler.tasks[running.key].who_has == {cluster.scheduler.workers[busy.address]}


async def test_a_worker_whose_results_find_no_place_stays_and_works_on() -> None:
    async with dask_cluster() as cluster:
        workers = [await cluster.add_worker(1) for _ in range(2)]
        client = cluster.client
        gate(1).set()
        kept = [client.submit(wait, 1, workers=[worker.address], pure=False) for worker in workers]
        await client.gather(kept)
        runs = cluster.scheduler.transition_counter
        assert await cluster.plugin.retire([worker.name for worker in workers], idle_only=True) == []
        await cluster.until(lambda: len(cluster.scheduler.running) == 2, "both take tasks again")
        assert len(cluster.scheduler.workers) == 2 and cluster.scheduler.transition_counter == runs
        assert sorted((await cluster.demand())["holding"]) == [worker.name for worker in workers]
        assert await client.submit(wait, 1, pure=False) == 1


async def test_a_worker_that_leaves_by_itself_is_left_to_do_so() -> None:
    async with dask_cluster() as cluster:
        leaving, _ = await cluster.add_worker(1), await cluster.add_worker(1)
        running = cluster.client.submit(wait, 1, workers=[leaving.address])
        # One that it has been sent, but has not begun, it would not begin any more.
        await cluster.until(lambda: leaving.state.executing, "at work")
        leaving.status = Status.closing_gracefully
        await cluster.until(lambda: len(cluster.scheduler.running) == 1, "word that it is leaving")
        assert await cluster.plugin.retire([leaving.name]) == []
        gate(1).set()
        assert await running == 1


async def test_a_worker_that_gets_a_task_while_others_are_retired_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Scheduler.retire_workers` waits for a lock before it stops workers from taking tasks."""
    async with dask_cluster() as cluster:
        worker = await cluster.add_worker(1)
        scheduler = cluster.scheduler
        async with scheduler._replica_lock("something else"):
            retiring = asyncio.ensure_future(cluster.plugin.retire([worker.name], idle_only=True))
            await asyncio.sleep(0)
            running = cluster.client.submit(wait, 1)
            await cluster.until(lambda: scheduler.workers[worker.address].processing, "in hand")
        assert await retiring == []
        await cluster.until(lambda: scheduler.running, "it takes tasks again")
        gate(1).set()
        assert await running == 1
        assert scheduler.tasks[running.key].suspicious == 0
        assert [entry[1:3] for entry in scheduler.transition_log if entry[0] == running.key][-2:] == [
            ("waiting", "processing"),
            ("processing", "memory"),
        ]


async def test_a_worker_that_is_lost_while_others_are_retired_takes_none_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with dask_cluster() as cluster:
        lost, *others = [await cluster.add_worker(1) for _ in range(4)]
        scheduler = cluster.scheduler

        def send(*messages: Any) -> None:
            raise CommClosedError("its connection has just broken")

        monkeypatch.setattr(scheduler.stream_comms[lost.address], "send", send)
        assert await cluster.plugin.retire([worker.name for worker in (lost, *others)], idle_only=True) == []
        await cluster.until(lambda: len(scheduler.running) == 3, "the others take tasks again")
        await cluster.until(lambda: lost.address not in scheduler.workers, "the lost one is removed")
        names = [worker.name for worker in others]
        assert sorted(await cluster.plugin.retire(names, idle_only=True)) == names
