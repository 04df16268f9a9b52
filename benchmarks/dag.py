"""A DAG of ten levels and 1,000 tasks, each with two futures of the level before: ours against DaskTaskRunner.

On the same scheduler and the same two HTCondor workers, as in `throughput`.
"""

from __future__ import annotations

import os

from benchmarks.parts import server
from benchmarks.result import Result
from benchmarks.task_flow import WIDTH
from benchmarks.task_load import workers

LEVELS = int(os.environ.get("BENCH_DAG_LEVELS", "10"))
WORKERS = 2


def run() -> Result:
    """Measure both, one after the other; no bound is set: the JSON line tells."""
    with server(), workers(WORKERS) as on:
        ours = on.measure("ours", "dag", LEVELS * WIDTH)
        peer = on.measure("peer", "dag", LEVELS * WIDTH)
    return Result(
        "dag",
        metrics={
            "levels": LEVELS,
            "workers": WORKERS,
            "times_faster": round(ours.rate / peer.rate, 3),
            "times_faster_until_the_api_shows_all": round(ours.settled_rate / peer.settled_rate, 3),
            **ours.figures(),
        },
        peers={"DaskTaskRunner": peer.figures()},
    )
