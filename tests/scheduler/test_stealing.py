"""Tasks that ask for resources do not stay in a pile on the worker that came first: on a scheduler and real workers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from prefect_htcdask.scheduler import stealing as spreading
from prefect_htcdask.scheduler.stealing import rebalance
from tests.support.dask_cluster import Cluster, dask_cluster, gate

CPU = {"htcdask-group-cpu": 1}
GPU = {"htcdask-group-gpu": 4, "GPU": 1}
OFFERS = {"cpu": CPU, "gpu": GPU}


@pytest.fixture(autouse=True)
def far_horizon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocked tasks seem to take ever longer, and a worker is given seconds of work: here it is given its share."""
    monkeypatch.setattr(spreading, "HORIZON", 1e9)


def blocked(number: int) -> int:
    """Waits for its gate."""
    assert gate(number).wait(30)
    return number


def load(cluster: Cluster) -> list[int]:
    return [len(cluster.scheduler.workers[worker.address].processing) for worker in cluster.workers]


async def submit(cluster: Cluster, numbers: range, resources: Mapping[str, float], **kwargs: Any) -> list[Any]:
    futures = cluster.client.map(blocked, numbers, resources=resources, pure=False, **kwargs)
    await cluster.until(lambda: all(f.key in cluster.scheduler.tasks for f in futures), "the tasks at the scheduler")
    return list(futures)


async def finish(cluster: Cluster, futures: list[Any]) -> None:
    for number in range(len(futures)):
        gate(number).set()
    assert await cluster.client.gather(futures) == list(range(len(futures)))


@pytest.mark.parametrize("stealing", [True, False])
async def test_who_joins_later_gets_its_share(stealing: bool) -> None:
    async with dask_cluster(OFFERS, {"distributed.scheduler.work-stealing": stealing}) as cluster:
        await cluster.add_worker(resources=CPU)
        futures = await submit(cluster, range(12), CPU)
        assert load(cluster) == [12]
        await cluster.add_worker(resources=CPU)
        await cluster.until(lambda: load(cluster) == [6, 6], "half of them each")
        await cluster.add_worker(resources=CPU)
        await cluster.until(lambda: load(cluster) == [4, 4, 4], "a third of them each")
        await finish(cluster, futures)


async def test_a_pile_is_spread_beside_a_higher_one_of_another_group() -> None:
    async with dask_cluster(OFFERS) as cluster:
        await cluster.add_worker(resources=CPU)
        await cluster.add_worker(nthreads=4, resources=GPU)
        futures = await submit(cluster, range(40), CPU)
        futures += await submit(cluster, range(40, 48), {"GPU": 1})
        assert load(cluster) == [40, 8]
        # It has four threads, but one GPU: a worker like it takes all but one of what it cannot run.
        await cluster.add_worker(nthreads=4, resources=GPU)
        await cluster.until(lambda: load(cluster) == [40, 4, 4], "half of the pile, and nothing of the other group")
        await finish(cluster, futures)


async def test_what_is_bound_to_a_worker_stays_there() -> None:
    async with dask_cluster(OFFERS) as cluster:
        first = await cluster.add_worker(resources=CPU)
        futures = await submit(cluster, range(4), CPU, workers=[first.address])
        futures += await submit(cluster, range(4, 8), CPU)
        await cluster.add_worker(resources=CPU)
        await cluster.until(lambda: load(cluster) == [4, 4], "what is not bound goes")
        await finish(cluster, futures)


async def test_what_runs_is_left_alone_and_what_is_level_stays() -> None:
    async with dask_cluster(OFFERS) as cluster:
        await cluster.add_worker(resources=CPU)
        futures = await submit(cluster, range(1), CPU)
        await cluster.add_worker(resources=CPU)
        assert rebalance(cluster.scheduler) == 0, "one task, which one worker runs"
        futures += await submit(cluster, range(1, 5), CPU)
        await cluster.until(lambda: sorted(load(cluster)) == [2, 3], "as level as five can be")
        await asyncio.sleep(0.1)
        assert rebalance(cluster.scheduler) == 0
        await finish(cluster, futures)


async def test_a_far_input_is_not_sent_about_for_a_short_wait() -> None:
    async with dask_cluster(OFFERS, {"distributed.scheduler.work-stealing": False}) as cluster:
        await cluster.add_worker(resources=CPU)
        data = cluster.client.submit(bytes, 1000, resources=CPU)
        await data
        futures = [
            cluster.client.submit(lambda number, _: blocked(number), number, data, resources=CPU) for number in range(4)
        ]
        await cluster.until(lambda: load(cluster) == [4], "all on the worker that has the input")
        cluster.scheduler.tasks[data.key].set_nbytes(10**15)
        await cluster.add_worker(resources=CPU)
        assert rebalance(cluster.scheduler) == 0
        cluster.scheduler.tasks[data.key].set_nbytes(1000)
        await cluster.until(lambda: load(cluster) == [2, 2], "half of them each")
        await finish(cluster, futures)
