"""Spreads tasks that ask for resources over the workers that can run them.

Dask gives such a task to a worker as soon as it is ready, however much that worker has; a worker that joins later gets
some of them by work stealing only, which measures a worker's load against that of all workers: beside another group
with much to do, a pile on one worker is left where it is (distributed, `stealing.WorkStealing.balance`). Here load is
compared among workers that are alike, which those of one group are. The move itself is Dask's own, by which the worker
says whether it has begun the task.

It travels by value to the scheduler (see `demand`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

from distributed.stealing import WorkStealing

HORIZON = 3.0
"""Seconds of work that a worker with too little is given at once."""

LOOKED_AT = 1000
"""Tasks of one worker that are looked at, at most, in one round."""

_SHORTEST = 0.001  # seconds that a task takes at least


def rebalance(scheduler: Any) -> int:
    """Have tasks moved from workers with more than they run at once to others that are alike and have less.

    Returns:
        how many workers were asked to give a task away.
    """
    stealing = scheduler.extensions.get("stealing")
    if stealing is None:
        # Work stealing is off (distributed.scheduler.work-stealing). Without its loop it moves nothing by itself.
        stealing = scheduler.extensions["stealing"] = WorkStealing(scheduler)
    alike: dict[Any, list[Any]] = {}
    for ws in scheduler.running:
        if ws.resources:
            alike.setdefault((ws.nthreads, frozenset(ws.resources.items())), []).append(ws)
    return sum(_level(scheduler, stealing, workers) for workers in alike.values() if len(workers) > 1)


def _level(scheduler: Any, stealing: Any, workers: list[Any]) -> int:
    """Level the load of workers that are alike."""
    loads = {ws: len(ws.processing) - len(ws.long_running) + int(stealing.in_flight_tasks.get(ws, 0)) for ws in workers}
    by_load = sorted(workers, key=lambda ws: loads[ws])
    # One task stands for all of them: how many of its kind a worker runs at once, and how long they take.
    example = next(_movable(stealing, by_load[-1]), None)
    if example is None:
        return 0
    slots = _slots(by_load[-1], example)
    share = sum(loads.values()) / len(workers)
    kept = max(slots, math.ceil(share))
    duration = max(_SHORTEST, scheduler._get_prefix_duration(example.prefix))
    wanted = min(slots * math.ceil(HORIZON / duration), max(1, math.floor(share)))
    victims = [ws for ws in by_load if loads[ws] > kept]
    tasks: dict[Any, Iterator[Any]] = {}
    moved = 0
    for thief in by_load:
        while loads[thief] < wanted and victims:
            victim = victims[-1]
            if victim not in tasks:
                tasks[victim] = _movable(stealing, victim)
            task = next(tasks[victim], None)
            if task is None or loads[victim] <= kept:
                victims.pop()
                continue
            wait = loads[victim] * duration / slots
            if not _can_run(thief, task) or scheduler.get_comm_cost(task, thief) > wait:
                continue
            stealing.move_task_request(task, victim, thief)
            loads[victim] -= 1
            loads[thief] += 1
            moved += 1
    return moved


def _movable(stealing: Any, ws: Any) -> Iterator[Any]:
    """Tasks of a worker that another one like it can run as well, those that it would run last first."""
    tasks = [
        task
        for task in islice(ws.processing, LOOKED_AT)
        if task.resource_restrictions
        and not task.worker_restrictions
        and not task.host_restrictions
        and task not in ws.executing  # as its last heartbeat tells; the worker itself says it for sure
        and task not in ws.long_running
        and task not in stealing.in_flight
    ]
    tasks.sort(key=lambda task: task.priority, reverse=True)
    return iter(tasks)


def _slots(ws: Any, task: Any) -> int:
    """How many tasks like this one a worker runs at once."""
    fitting = [int(ws.resources.get(name, 0) // need) for name, need in task.resource_restrictions.items() if need > 0]
    return max(1, min([ws.nthreads, *fitting]))


def _can_run(ws: Any, task: Any) -> bool:
    return all(ws.resources.get(name, 0) >= need for name, need in task.resource_restrictions.items())
