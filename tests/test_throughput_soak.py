"""A worker that serves many flow runs does not grow: what it caches is bounded, and nothing of a task run stays.

The 20,000 task runs of the benchmark `soak` take minutes; here are fewer, of more tasks than a worker keeps envelopes.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import distributed
import pytest
from prefect import flow, task

from prefect_htcdask import HTCDaskTaskRunner, worker_runtime
from tests.waiting import wait_until

pytestmark = [pytest.mark.usefixtures("prefect_api"), pytest.mark.soak]

FLOW_RUNS = 10
TASKS_PER_FLOW_RUN = 10
CALLS = 6
ALLOWANCE = 2_000_000
"""Bytes by which a worker may grow with a flow run once its caches are full, as allocators do."""


def one(x: int) -> list[int]:
    return [x]


@pytest.fixture(scope="module")
def workers(prefect_server: Any) -> Iterator[distributed.LocalCluster]:
    """Workers that no other test has used."""
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        yield cluster


def held(dask_worker: distributed.Worker) -> dict[str, int]:
    """What a worker process holds; runs there."""
    import ctypes
    import gc

    import psutil
    from prefect.context import FlowRunContext

    from prefect_htcdask import worker_runtime

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not held
    names = [type(thing).__name__ for thing in gc.get_objects()]
    return {
        "bytes": psutil.Process().memory_full_info().uss,
        "envelopes": len(worker_runtime._envelopes._entries),
        "locks": len(worker_runtime._envelopes._locks),
        "clients": names.count("SyncPrefectClient"),
        "flow_contexts": names.count(FlowRunContext.__name__),
        "engines": names.count("SyncTaskRunEngine"),
        "services": names.count("EventsWorker") + names.count("APILogWorker"),
        "dask_tasks": len(dask_worker.state.tasks),
    }


def let_go(look: dict[str, dict[str, int]]) -> dict[str, dict[str, int]] | None:
    """The same, once the workers hold no Dask task any more."""
    return look if not any(worker["dask_tasks"] for worker in look.values()) else None


def grown_table(looks: list[dict[str, dict[str, int]]]) -> str:
    """What each worker held after each flow run, for the report of a failure."""
    return "\n".join(f"{number}: {worker}" for number, look in enumerate(looks) for worker in look.values())


@pytest.mark.timeout(900)
def test_a_worker_that_serves_many_flow_runs_does_not_grow(workers: distributed.LocalCluster) -> None:
    @flow(task_runner=HTCDaskTaskRunner(address=workers.scheduler_address))
    def many() -> None:
        for futures in [task(one, name=f"one-{number}").map(range(CALLS)) for number in range(TASKS_PER_FLOW_RUN)]:
            futures.wait()

    looks: list[dict[str, dict[str, int]]] = []
    with distributed.Client(workers.scheduler_address, set_as_default=False) as client:
        for _ in range(FLOW_RUNS):
            many()
            # Dask lets go of a flow run's data after its client has gone.
            looks.append(
                wait_until(lambda: let_go(client.run(held)), 60, "no data of the flow run left on the workers")
            )
    assert FLOW_RUNS * TASKS_PER_FLOW_RUN > worker_runtime.MAX_ENVELOPES, "the bound is never reached"
    print(grown_table(looks))
    last = looks[-1]
    for worker in last.values():
        assert worker["envelopes"] == worker_runtime.MAX_ENVELOPES
        assert worker["flow_contexts"] <= worker_runtime.MAX_ENVELOPES + 1
        assert worker["services"] <= 2
        assert worker["clients"] <= worker_runtime.MAX_CLIENTS_PER_THREAD
        assert worker["locks"] == worker["engines"] == 0
    full = next(
        number
        for number, look in enumerate(looks)
        if min(worker["envelopes"] for worker in look.values()) == worker_runtime.MAX_ENVELOPES
    )
    assert full < FLOW_RUNS - 2
    grown = {name: (last[name]["bytes"] - looks[full][name]["bytes"]) / (FLOW_RUNS - 1 - full) for name in last}
    assert statistics.mean(grown.values()) < ALLOWANCE, grown
