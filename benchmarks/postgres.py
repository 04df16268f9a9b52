"""Throughput against a Prefect server on PostgreSQL: what the server itself can take, and how close a map comes to it.

The server's own rate is that of the same events posted straight at it, with no task, worker or scheduler on the
machine's cores meanwhile; so that a map reaches it only where cores abound. The same on SQLite stands beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

from benchmarks.parts import server
from benchmarks.postgresql import postgresql
from benchmarks.result import Result
from benchmarks.task_load import workers

TASKS = int(os.environ.get("BENCH_POSTGRES_TASKS", "2000"))
WORKERS = 2


def run() -> Result:
    """Measure both databases; no bound is set: the JSON line tells."""
    found = {name: measure(name == "PostgreSQL") for name in ("PostgreSQL", "SQLite")}
    return Result(
        "postgres",
        metrics={"tasks": TASKS, "workers": WORKERS, **found["PostgreSQL"]},
        peers={"the same on SQLite": found["SQLite"]},
    )


def measure(on_postgresql: bool) -> dict[str, Any]:
    """The server's own rate, and ours."""
    with postgresql() if on_postgresql else nullcontext() as database, server(database):
        alone = json.loads(
            subprocess.run(
                [sys.executable, "-m", "benchmarks.server_events", str(TASKS)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            ).stdout.splitlines()[-1]
        )
        rate = TASKS / alone["stored_seconds"]
        print(f"the server alone: {rate:.1f} task runs/s", file=sys.stderr, flush=True)
        with workers(WORKERS) as on:
            ours = on.measure("ours", "map", TASKS)
    return {
        "server_tasks_per_second": round(rate, 3),
        "server_events_per_second": round(alone["events"] / alone["stored_seconds"], 3),
        "share_of_the_servers_rate": round(ours.settled_rate / rate, 3),
        **ours.figures(),
    }
