"""Dask clients in tasks: none spoils its worker for others, and no wait keeps the slot that it waits for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import dask.bag
import distributed
import pytest
from distributed import Client, LocalCluster, get_client, get_worker, worker_client
from prefect import flow, task
from prefect_dask import get_dask_client as stock_get_dask_client

from prefect_htcdask import HTCDaskTaskRunner, get_async_dask_client, get_dask_client

pytestmark = pytest.mark.usefixtures("prefect_api")


@pytest.fixture(scope="module")
def one_thread(prefect_server: Any) -> Iterator[Any]:
    """A cluster of one worker of one thread."""
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster


@task
def inner(x: int) -> int:
    return x + 1


@task
def documented() -> Any:
    """As prefect-dask's documentation shows it."""
    with get_dask_client() as client:
        return client.compute(dask.bag.range(4, npartitions=2).sum()).result(timeout=60)


@task
def computed() -> Any:
    with get_dask_client():
        return dask.bag.range(4, npartitions=2).sum().compute()


@task
def own_arguments() -> Any:
    with get_dask_client(name="another", direct_to_workers=False) as client:
        assert "another" in client.id and get_client() is client
        return client.submit(sum, [1, 2, 3]).result(timeout=60)


@task
def completed() -> Any:
    with get_dask_client() as client:
        futures = client.map(abs, [-1, -2, -3])
        distributed.wait(futures, timeout=60)
        return sum(one.result() for one in distributed.as_completed(futures, timeout=60))


@task
async def documented_async() -> Any:
    async with get_async_dask_client() as client:
        return await client.compute(dask.bag.range(4, npartitions=2).sum())


@task
def stock() -> Any:
    """prefect-dask's own, which makes its client the default of the process and closes it."""
    with stock_get_dask_client() as client:
        future = client.submit(sum, [1, 2, 3])
        distributed.secede()
        return future.result(timeout=60)


@task
def temporary() -> Any:
    with Client(get_worker().scheduler.address):
        return dask.bag.range(4, npartitions=2).sum().compute()


@task
def nested() -> Any:
    return inner.submit(5).result(timeout=60)


@task
def nested_map() -> Any:
    return sum(inner.map([0, 1, 2]).result(timeout=60))


@task
def bare() -> Any:
    return dask.bag.range(4, npartitions=2).sum().compute()


@task
def waits_on_its_only_thread() -> Any:
    client = get_client()
    return sum(client.gather([client.submit(sum, [1, 2]), client.submit(abs, -2)])) + client.submit(abs, -1).result()


@task
def with_worker_client() -> Any:
    with worker_client() as client:
        return client.submit(sum, [1, 2, 3]).result(timeout=60)


@task
def closes_it() -> Any:
    with get_dask_client() as client:
        value = client.submit(sum, [1, 2, 3]).result(timeout=60)
        client.close()
        return value


LEAVE: list[Any] = [documented, computed, own_arguments, completed, documented_async, stock, temporary, closes_it]
AFTER: list[Any] = [nested, nested_map, bare, waits_on_its_only_thread, with_worker_client]


def test_whatever_client_a_task_had_the_next_has_one_that_works(one_thread: Any) -> None:
    @flow(task_runner=HTCDaskTaskRunner(cluster=one_thread))
    def computing() -> list[Any]:
        return [(one.name, one.submit().result(timeout=120)) for first in LEAVE for one in (first, *AFTER, first)]

    assert [name for name, value in computing() if value != 6] == []


@task
def slots() -> int:
    """How many threads of the worker take tasks."""
    return len(get_worker().executors["default"]._threads)  # type: ignore[attr-defined]


def test_a_task_has_its_slot_again_afterwards(one_thread: Any) -> None:
    before: Callable[[], int] = slots.fn

    @task
    def around() -> tuple[int, int]:
        with get_dask_client():
            within = len(distributed.get_worker().state.long_running)
        return within, before()

    @flow(task_runner=HTCDaskTaskRunner(cluster=one_thread))
    def computing() -> Any:
        return [around.submit().result(timeout=60)[1] for _ in range(3)], slots.submit().result(timeout=60)

    assert computing() == ([1, 1, 1], 1)
