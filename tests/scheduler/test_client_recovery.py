"""The scheduler keeps the work of a client that is away, and does not blame tasks for the workers lost with it."""

from __future__ import annotations

import asyncio
import time
from contextlib import closing
from typing import Any, cast

import distributed

from prefect_htcdask.scheduler import client_recovery
from prefect_htcdask.scheduler.pickle_by_value import install
from prefect_htcdask.scheduler.worker_loss import AT_ONCE, WorkerLossPlugin
from tests.support.dask_cluster import dask_cluster, gate
from tests.support.waiting import wait_until
from tests.support.wire import PATIENCE, Wire, nothing_is_kept


def test_work_is_kept_for_a_time_only_and_for_those_who_asked(dask_pool: distributed.LocalCluster) -> None:
    """A flow's process that is killed leaves its tasks in a warm pool no longer than that."""
    scheduler: Any = dask_pool.scheduler

    def future_of(client: distributed.Client) -> distributed.Future[Any]:
        future = client.submit(max, [1, len(str(client.id))], pure=False)
        future.result(timeout=20)
        return future

    def vanish(client: distributed.Client) -> None:
        cast(Any, client).status = "closed"
        cast(Any, client).loop.add_callback(cast(Any, client).scheduler_comm.abort)

    with (
        distributed.Client(dask_pool, set_as_default=False) as asked,
        distributed.Client(dask_pool, set_as_default=False) as not_,
    ):
        install(asked, client_recovery.ClientRecoveryPlugin())
        asked.sync(cast(Any, asked).scheduler.htcdask_keep, client=asked.id, seconds=2)
        kept, gone = future_of(asked), future_of(not_)
        since = time.monotonic()
        vanish(asked)
        vanish(not_)
        wait_until(lambda: gone.key not in scheduler.tasks, PATIENCE, "nobody keeps this")
        assert kept.key in scheduler.tasks or time.monotonic() - since > 2
        wait_until(lambda: kept.key not in scheduler.tasks, PATIENCE, "nobody keeps that any more")
        assert time.monotonic() - since >= 2
    assert not scheduler.plugins[client_recovery.ClientRecoveryPlugin.name].seconds
    assert nothing_is_kept(scheduler)


def wait_at_gate(number: int) -> int:
    gate(0).wait(PATIENCE)
    return number


def test_tasks_are_not_blamed_for_workers_that_were_lost_with_the_client() -> None:
    """A proxy's end takes the connections of all workers, one after the other: a task goes from one to the next."""

    async def losing() -> list[tuple[str, int]]:
        async with dask_cluster() as cluster:
            scheduler: Any = cluster.scheduler
            for plugin in (WorkerLossPlugin(), client_recovery.ClientRecoveryPlugin()):
                await scheduler.register_scheduler_plugin(plugin, idempotent=True)
            with closing(Wire(scheduler)) as wire:
                for number in range(16):
                    cluster.workers.append(
                        await distributed.Worker(wire.address, nthreads=1, dashboard=False, name=f"htcdask-{number}.0")
                    )
                client = distributed.Client(wire.address, asynchronous=True, set_as_default=False)
                async with client:
                    await cast(Any, client).scheduler.htcdask_keep(client=client.id, seconds=60)
                    futures = [client.submit(wait_at_gate, n, key=f"wait{n}-{n}") for n in range(16)]
                    await cluster.until(
                        lambda: sum(len(ws.processing) for ws in scheduler.workers.values()) == 16, "all are at work"
                    )
                    wire.cut()
                    await cluster.until(lambda: not scheduler.workers, "all workers are lost")
                    await asyncio.sleep(2 * AT_ONCE)
                    found = [(task.state, task.suspicious) for task in scheduler.tasks.values()]
                    gate(0).set()
                    del futures
                    return found

    assert asyncio.run(losing()) == [("queued", 0)] * 16


def test_tasks_are_blamed_for_a_worker_that_is_lost_alone() -> None:
    async def losing() -> list[int]:
        async with dask_cluster() as cluster:
            scheduler: Any = cluster.scheduler
            for plugin in (WorkerLossPlugin(), client_recovery.ClientRecoveryPlugin()):
                await scheduler.register_scheduler_plugin(plugin, idempotent=True)
            worker = await cluster.add_worker()
            future = cluster.client.submit(wait_at_gate, 1, key="wait-1")
            await cluster.until(lambda: scheduler.workers[worker.address].processing, "it is at work")
            scheduler.stream_comms[worker.address].abort()
            await cluster.until(lambda: not scheduler.workers, "the worker is lost")
            await cluster.until(lambda: scheduler.tasks["wait-1"].suspicious, "it is blamed")
            await asyncio.sleep(AT_ONCE)
            gate(0).set()
            assert future.key == "wait-1"
            return [task.suspicious for task in scheduler.tasks.values()]

    assert asyncio.run(losing()) == [1]
