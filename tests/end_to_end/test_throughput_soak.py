"""A worker that serves many flow runs does not grow: what it caches is bounded, and nothing of a task run stays.

The 20,000 task runs of the benchmark `soak` take minutes; here are fewer, of more tasks and flow runs than a worker
keeps envelopes and contexts. Dask's own profiler is off: it keeps a tree of call stacks for each of the last 1,000
seconds (`distributed.admin.low-level-log-length`), 0.16 MB for a busy one as measured here.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import dask
import distributed
import pytest
from prefect import flow, task

from prefect_htcdask import HTCDaskTaskRunner
from prefect_htcdask.worker import context, context_cache
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.usefixtures("prefect_api"), pytest.mark.soak]

FLOW_RUNS = context_cache.MAX_CONTEXTS + 12
TASKS_PER_FLOW_RUN = 20
CALLS = 3
ALLOWANCE = 300_000
"""Bytes by which a worker may grow with a flow run once its caches are full: Prefect keeps the last events that it has
sent, 700 at most, until the server has confirmed them, and allocators keep some."""


def one(x: int) -> list[int]:
    return [x]


@pytest.fixture(scope="module")
def workers(prefect_server: Any) -> Iterator[distributed.LocalCluster]:
    """Workers that no other test has used."""
    with (
        dask.config.set({"distributed.worker.profile.enabled": False}),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
    ):
        yield cluster


def held(dask_worker: distributed.Worker) -> dict[str, int]:
    """What a worker process holds; runs there."""
    import ctypes
    import gc

    import psutil
    from prefect.context import FlowRunContext

    from prefect_htcdask.worker import context_cache

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not held
    names = [type(thing).__name__ for thing in gc.get_objects()]
    return {
        "bytes": psutil.Process().memory_full_info().uss,
        "envelopes": len(context_cache.envelopes),
        "contexts": len(context_cache.contexts),
        "locks": len(context_cache.envelopes._locks) + len(context_cache.contexts._locks),
        "clients": names.count("SyncPrefectClient"),
        "flow_contexts": names.count(FlowRunContext.__name__),
        "events": names.count("Event"),
        "objects": len(names),
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
    assert FLOW_RUNS * TASKS_PER_FLOW_RUN > context_cache.MAX_ENVELOPES, "the bound is never reached"
    print(grown_table(looks))
    last = looks[-1]
    for worker in last.values():
        assert worker["envelopes"] == context_cache.MAX_ENVELOPES
        assert worker["contexts"] == context_cache.MAX_CONTEXTS
        # The last task run's is not yet forgotten.
        assert worker["flow_contexts"] <= context_cache.MAX_CONTEXTS + 1
        assert worker["services"] <= 2
        assert worker["clients"] <= context.MAX_CLIENTS_PER_THREAD
        assert worker["locks"] == worker["engines"] == 0
    full = next(
        number
        for number, look in enumerate(looks)
        if min(worker["contexts"] for worker in look.values()) == context_cache.MAX_CONTEXTS
    )
    assert full < FLOW_RUNS - 5
    grown = {name: (last[name]["bytes"] - looks[full][name]["bytes"]) / (FLOW_RUNS - 1 - full) for name in last}
    assert statistics.mean(grown.values()) < ALLOWANCE, grown
