"""One map of 1,000, 10,000 and 50,000 no-op tasks: does the time for each stay, and does the flow's process grow?

Memory is the USS of the flow's process: what it has for itself alone, and would free by ending. The growth of a map is
its largest USS while it runs, over that before it, all its futures and results being kept. The API is not waited for: a
server on SQLite takes a fraction of the task runs a second, and would have an hour's backlog of 50,000.

The least of them takes seconds, and what else the machine does in these would pass for a trend. So it runs once
unmeasured and then a few times, each when the API shows all of the one before, and its median counts.
"""

from __future__ import annotations

import os

from benchmarks.parts import server
from benchmarks.result import Result
from benchmarks.task_load import Spent, workers

SIZES = tuple(int(size) for size in os.environ.get("BENCH_SCALING_TASKS", "1000,10000,50000").split(","))
WORKERS = 2
SPREAD_GOAL = 1.2
GROWTH_GOAL = 8 * 1024
REPEATS = 5


def run() -> Result:
    """Measure each size in a flow of its own; no peer is needed."""
    with server(), workers(WORKERS) as on:
        on.measure("ours", "map", SIZES[0])
        repeated = [on.measure("ours", "map", SIZES[0], memory=True) for _ in range(REPEATS)]
        spent = {SIZES[0]: sorted(repeated, key=lambda one: one.seconds)[REPEATS // 2]}
        spent.update({size: on.measure("ours", "map", size, memory=True, settle=False) for size in SIZES[1:]})
    seconds = {size: one.seconds / size for size, one in spent.items()}
    grown = {size: growth(one) for size, one in spent.items()}
    spread = max(seconds.values()) / min(seconds.values())
    return Result(
        "scaling",
        metrics={
            "workers": WORKERS,
            "seconds_per_task": {str(size): round(each, 6) for size, each in seconds.items()},
            "slowest_over_fastest": round(spread, 3),
            "least_size_seconds_per_task": [round(one.seconds / one.tasks, 6) for one in repeated],
            "flow_bytes_per_task": {str(size): round(each) for size, each in grown.items()},
            **{f"{size} tasks": one.figures() for size, one in spent.items()},
        },
        goal={"slowest_over_fastest_at_most": SPREAD_GOAL, "flow_bytes_per_task_at_most": GROWTH_GOAL},
        checks={"seconds_per_task": spread <= SPREAD_GOAL, "flow_bytes": max(grown.values()) <= GROWTH_GOAL},
    )


def growth(spent: Spent) -> float:
    """Bytes for each task by which the flow's process has grown at most."""
    assert spent.most_bytes is not None and spent.first_bytes is not None
    return (spent.most_bytes - spent.first_bytes) / spent.tasks
