"""No-op tasks each second: ours against DaskTaskRunner, on the same scheduler and the same HTCondor workers.

Both runners get the address of one running cluster: that leaves out how each would come to its workers, which is not
what is measured. It is the better half of the comparison for DaskTaskRunner, since the workers have already imported
all that its tasks need. There are as many workers as the machine has cores, which is how pools are cut into slots: more
would measure how the kernel changes between them. The floor is the engine alone, `run_task_sync` in a loop in one
process.
"""

from __future__ import annotations

import os
from statistics import mean
from typing import Any

from benchmarks.parts import server
from benchmarks.result import Result
from benchmarks.task_load import Spent, floor, on_average, workers

TASKS = int(os.environ.get("BENCH_THROUGHPUT_TASKS", "2000"))
PEER_TASKS = int(os.environ.get("BENCH_THROUGHPUT_PEER_TASKS", "500"))
WORKERS = tuple(int(count) for count in os.environ.get("BENCH_THROUGHPUT_WORKERS", str(os.cpu_count())).split(","))
"""Numbers of workers to measure with: as many as this machine has cores, as a pool's slots are."""

SHAPES = ("map", "submit")
ROUNDS = 2
"""Times that each of ours is measured, between two looks at the floor: what else the machine does comes and goes."""

TIMES_FASTER_GOAL = 10.0
FLOW_CPU_GOAL = 3e-3
WORKERS_OVER_FLOOR_GOAL = 2.0


def run() -> Result:
    """Measure both runners, by `map` and by `submit`, with each number of workers."""
    ours: dict[str, Spent] = {}
    peers: dict[str, Spent] = {}
    floors: dict[str, float] = {}
    for count in WORKERS:
        with server(), workers(count) as on:
            for shape in SHAPES:
                name = f"{shape}, {count} workers"
                floors_here, rounds = [floor(PEER_TASKS)], []
                for _ in range(ROUNDS):
                    rounds.append(on.measure("ours", shape, TASKS))
                    floors_here.append(floor(PEER_TASKS))
                ours[name], floors[name] = on_average(rounds), mean(floors_here)
                peers[name] = on.measure("peer", shape, PEER_TASKS)
    # DaskTaskRunner's time grows with the number of tasks, so that fewer do, scaled.
    faster = {name: ours[name].rate / peers[name].rate for name in ours}
    settled = {name: ours[name].settled_rate / peers[name].settled_rate for name in ours}
    over_floor = {name: ours[name].workers_cpu_per_task / floors[name] for name in ours}
    return Result(
        "throughput",
        metrics={
            "times_faster": rounded(faster),
            "times_faster_until_the_api_shows_all": rounded(settled),
            "workers_cpu_over_floor": rounded(over_floor),
            "floor_cpu_seconds_per_task": {name: round(seconds, 6) for name, seconds in floors.items()},
            **{name: spent.figures() for name, spent in ours.items()},
        },
        peers={"DaskTaskRunner": {name: spent.figures() for name, spent in peers.items()}},
        goal={
            "times_faster_at_least": TIMES_FASTER_GOAL,
            "flow_cpu_seconds_per_task_at_most": FLOW_CPU_GOAL,
            "workers_cpu_over_floor_at_most": WORKERS_OVER_FLOOR_GOAL,
        },
        checks={
            "times_faster": min(faster.values()) >= TIMES_FASTER_GOAL,
            "flow_cpu": max(spent.flow_cpu_per_task for spent in ours.values()) <= FLOW_CPU_GOAL,
            "workers_cpu": max(over_floor.values()) <= WORKERS_OVER_FLOOR_GOAL,
        },
    )


def rounded(figures: dict[str, float]) -> dict[str, Any]:
    """The same, to three places."""
    return {name: round(figure, 3) for name, figure in figures.items()}
