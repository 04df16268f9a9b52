"""20,000 tasks of forty flow runs on the same two workers: do these grow?"""

from __future__ import annotations

import os
import sys
from typing import Any

from distributed import Client

from benchmarks.parts import server
from benchmarks.result import Result
from benchmarks.task_flow import Order
from benchmarks.task_load import run_order, workers

TASKS = int(os.environ.get("BENCH_SOAK_TASKS", "20000"))
RUNS = int(os.environ.get("BENCH_SOAK_RUNS", "40"))
WORKERS = 2
PARTS = 4
GROWTH_GOAL = 512
"""Bytes for each task: 20,000 of them leave a worker at most 10 MB larger."""


def run() -> Result:
    """Look at the workers after each quarter; the first is theirs to fill their caches."""
    looks: list[list[dict[str, Any]]] = []
    with server(), workers(WORKERS) as on:
        for part in range(PARTS):
            run_order(Order("ours", "map", TASKS // PARTS, 0, on.address, on.security, runs=RUNS // PARTS))
            looks.append(look_at(on.client))
            print(f"{part + 1}/{PARTS}: {looks[-1]}", file=sys.stderr, flush=True)
    after_first = TASKS * (PARTS - 1) / PARTS / WORKERS
    grown = [
        (last["own_bytes"] - first["own_bytes"]) / after_first for first, last in zip(looks[0], looks[-1], strict=True)
    ]
    held = {
        name: max(worker[name] for look in looks for worker in look)
        for name in ("envelopes", "blobs", "clients", "tasks")
    }
    most = {"envelopes": looks[-1][0]["most_envelopes"], "clients": looks[-1][0]["most_clients"]}
    return Result(
        "soak",
        metrics={
            "tasks": TASKS,
            "flow_runs": RUNS,
            "workers": WORKERS,
            "bytes_per_task": [round(each, 1) for each in grown],
            "own_bytes": [[worker["own_bytes"] for worker in look] for look in looks],
            "held_at_most": held,
        },
        goal={"bytes_per_task_at_most": GROWTH_GOAL, "held_at_most": most},
        checks={
            "bytes_per_task": max(grown) <= GROWTH_GOAL,
            "held": all(held[name] <= bound for name, bound in most.items()),
        },
    )


def look_at(client: Client) -> list[dict[str, Any]]:
    """The workers' memory and what their caches hold."""
    return [answer for _, answer in sorted(client.run(held_here).items())]


def held_here(dask_worker: Any) -> dict[str, Any]:
    """What this worker process holds; runs on the worker."""
    import gc

    import psutil

    from prefect_htcdask import worker_runtime

    gc.collect()
    return {
        "own_bytes": psutil.Process().memory_full_info().uss,
        "envelopes": len(worker_runtime._envelopes._entries),
        "most_envelopes": worker_runtime.MAX_ENVELOPES,
        "blobs": len(worker_runtime._blobs._entries),
        "clients": sum(type(thing).__name__ == "SyncPrefectClient" for thing in gc.get_objects()),
        "most_clients": worker_runtime.MAX_CLIENTS_PER_THREAD * (dask_worker.state.nthreads + 1),
        "tasks": len(dask_worker.state.tasks),
    }
