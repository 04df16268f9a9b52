"""Flow runs on a warm pool: what `DaskTaskRunner` documents holds here too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import distributed
import pytest
from prefect import flow, task

from prefect_htcdask import HTCDaskTaskRunner


@pytest.fixture(scope="module")
def pool(prefect_server: Any) -> Iterator[distributed.LocalCluster]:
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
    ) as cluster:
        yield cluster


@task
def double(x: int) -> int:
    return 2 * x


@task
def add(x: int, y: int) -> int:
    return x + y


def test_submit_and_map(pool: distributed.LocalCluster, prefect_api: Any) -> None:
    @flow(task_runner=HTCDaskTaskRunner(cluster=pool))
    def computing() -> Any:
        one = double.submit(1)
        many = double.map([1, 2, 3])
        both = add.submit(one, many[2])
        return one.result(), many.result(), both.result(), add.map(many, 1).result()

    assert computing() == (2, [2, 4, 6], 8, [3, 5, 7])
