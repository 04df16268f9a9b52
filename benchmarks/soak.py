"""20,000 tasks of 320 flow runs on the same two workers: do these grow?

In the first half their caches fill, which hold fewer envelopes than that; what they grow by in the second stays. Each
quarter is told as well: what leaks goes on at the same rate, and shows in the number of blocks of memory that the
interpreter has given out. Bytes alone were seen to rise once by 2 MB, most likely as a table of its own was doubled.

Dask's profiler is off: it keeps call stacks for each of the last 1,000 seconds, which is no growth of ours. Nor is what
Dask remembers of the last 100,000 keys (`dask.utils.key_split`), some 300 bytes each, which is emptied before each
look; nor its logs of the last 1,000 transfers, transitions and messages and of an hour of the system's state, which
takes longer to fill than this: here they are of 100.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from typing import Any

from distributed import Client

from benchmarks.parts import server
from benchmarks.result import Result
from benchmarks.task_flow import Order
from benchmarks.task_load import run_order, workers

TASKS = int(os.environ.get("BENCH_SOAK_TASKS", "20000"))
RUNS = int(os.environ.get("BENCH_SOAK_RUNS", "320"))
WORKERS = 2
PARTS = 4
GROWTH_GOAL = 512
"""Bytes for each task that a worker has run: 10,000 of them leave it at most 5 MB larger."""
DASK = {
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
    "DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH": "100",
    "DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__LOG_LENGTH": "100",
}
CONFIRM_TIMEOUT = 120.0
"""Seconds that the API may take to confirm the last events; Prefect asks it every 30 s."""


def run() -> Result:
    """Look at the workers after each quarter."""
    looks: list[list[dict[str, Any]]] = []
    with server(), workers(WORKERS, **DASK) as on:
        for part in range(PARTS):
            run_order(Order("ours", "map", TASKS // PARTS, 0, on.address, on.security, runs=RUNS // PARTS))
            looks.append(look_at(on.client))
            print(f"{part + 1}/{PARTS}: {looks[-1]}", file=sys.stderr, flush=True)
    tasks = TASKS / PARTS / WORKERS
    quarters = [grown(before, after, tasks) for before, after in itertools.pairwise(looks)]
    second_half = grown(looks[PARTS // 2 - 1], looks[-1], tasks * PARTS / 2)
    held = {
        name: max(worker[name] for look in looks for worker in look)
        for name in ("envelopes", "contexts", "blobs", "clients", "tasks")
    }
    most = {name: looks[-1][0][f"most_{name}"] for name in ("envelopes", "contexts", "clients")}
    return Result(
        "soak",
        metrics={
            "tasks": TASKS,
            "flow_runs": RUNS,
            "workers": WORKERS,
            "bytes_per_task": second_half,
            "bytes_per_task_in_each_quarter": quarters,
            "own_bytes": [[worker["own_bytes"] for worker in look] for look in looks],
            "blocks": [[worker["blocks"] for worker in look] for look in looks],
            "blocks_per_task": grown(looks[PARTS // 2 - 1], looks[-1], tasks * PARTS / 2, "blocks"),
            "held_at_most": held,
        },
        goal={"bytes_per_task_at_most": GROWTH_GOAL, "held_at_most": most},
        checks={
            "bytes_per_task": max(second_half) <= GROWTH_GOAL,
            "held": all(held[name] <= bound for name, bound in most.items()),
        },
    )


def grown(
    before: list[dict[str, Any]], after: list[dict[str, Any]], tasks: float, what: str = "own_bytes"
) -> list[float]:
    """By how much for each task each worker has grown between two looks, in which it has run that many."""
    return [round((now[what] - then[what]) / tasks, 1) for then, now in zip(before, after, strict=True)]


def look_at(client: Client) -> list[dict[str, Any]]:
    """The workers' memory and what their caches hold, once the API has confirmed all their events.

    Prefect keeps each event until then, 700 of them or for half a minute: megabytes that come and go. Its services must
    not be drained for this: it keeps a stopped one, and all that this holds, until the process ends (prefect 3.8,
    `_QueueServiceBase.start`).
    """
    deadline = time.monotonic() + CONFIRM_TIMEOUT
    while any(client.run(unconfirmed).values()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"after {CONFIRM_TIMEOUT:.0f} s there are events that the API has not confirmed")
        time.sleep(1)
    return [answer for _, answer in sorted(client.run(held_here).items())]


def unconfirmed() -> int:
    """How many events this worker process keeps, queued or sent; runs on the worker. They are private to Prefect."""
    from prefect.events.worker import EventsWorker

    services = [service for service in list(EventsWorker._instances.values()) if isinstance(service, EventsWorker)]
    return sum(service._queue.qsize() + len(service._client._unconfirmed_events) for service in services)


def held_here(dask_worker: Any) -> dict[str, Any]:
    """What this worker process holds; runs on the worker."""
    import ctypes
    import gc
    import sys

    import psutil
    from dask.utils import key_split

    from prefect_htcdask.worker import context, context_cache, metadata_cache

    key_split.cache_clear()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not held
    return {
        "own_bytes": psutil.Process().memory_full_info().uss,
        "blocks": sys.getallocatedblocks(),
        "envelopes": len(context_cache.envelopes),
        "most_envelopes": context_cache.MAX_ENVELOPES,
        "contexts": len(context_cache.contexts),
        "most_contexts": context_cache.MAX_CONTEXTS,
        "blobs": len(metadata_cache.blobs),
        "clients": sum(type(thing).__name__ == "SyncPrefectClient" for thing in gc.get_objects()),
        "most_clients": context.MAX_CLIENTS_PER_THREAD * (dask_worker.state.nthreads + 1),
        "tasks": len(dask_worker.state.tasks),
    }
