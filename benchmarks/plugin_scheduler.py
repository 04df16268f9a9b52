"""A Dask scheduler in a process of its own, with or without our plugin, that tells its CPU time: for `plugin`.

``python -m benchmarks.plugin_scheduler [none|plugin|timed]`` prints its address, and ends when its input does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import dask
from distributed import Scheduler

from prefect_htcdask.gateway.supervisor_config import scheduler_plugins
from prefect_htcdask.scheduler.plugin import PLUGIN_NAME

CALIBRATION = 200_000


class Timed:
    """Adds up the CPU time of this thread inside a function, without that of reading the clock.

    Attributes:
        calls: how often it was called.
        nanoseconds: spent in it, with the clock's own part.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.calls = self.nanoseconds = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        started = time.thread_time_ns()
        result = self.function(*args, **kwargs)
        self.nanoseconds += time.thread_time_ns() - started
        self.calls += 1
        return result

    async def awaited(self, *args: Any, **kwargs: Any) -> Any:
        """The same for a coroutine that never lets another run meanwhile."""
        started = time.thread_time_ns()
        result = await self.function(*args, **kwargs)
        self.nanoseconds += time.thread_time_ns() - started
        self.calls += 1
        return result


def clock_cost() -> float:
    """Nanoseconds between two readings of the clock with nothing in between."""
    started = time.thread_time_ns()
    total = 0
    for _ in range(CALIBRATION):
        one = time.thread_time_ns()
        total += time.thread_time_ns() - one
    assert time.thread_time_ns() > started
    return total / CALIBRATION


def wrapper_cost() -> float:
    """Nanoseconds that a call takes longer for being timed."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    def loop(function: Callable[..., Any]) -> int:
        started = time.thread_time_ns()
        for _ in range(CALIBRATION):
            function("key", "released", "waiting", stimulus_id="x")
        return time.thread_time_ns() - started

    return (loop(Timed(nothing)) - loop(nothing)) / CALIBRATION


async def main(mode: str) -> None:
    """Serve until the input ends."""
    logging.getLogger("distributed").setLevel(logging.WARNING)
    with dask.config.set({"distributed.admin.system-monitor.log-length": 10}):
        scheduler = await Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0", dashboard=False)
    timed: dict[str, Timed] = {}
    clock, wrapper = clock_cost(), wrapper_cost()
    if mode != "none":
        for name, plugin in scheduler_plugins(0.0, {"default": {}}).items():
            await scheduler.register_scheduler_plugin(plugin, name=name, idempotent=True)
    if mode == "timed":
        plugin: Any = scheduler.plugins[PLUGIN_NAME]
        plugin.transition = timed["transition"] = Timed(plugin.transition)
        timed["demand"] = Timed(plugin.demand)
        scheduler.handlers["htcdask_demand"] = timed["demand"].awaited

    def times() -> dict[str, Any]:
        return {
            "cpu": time.process_time(),
            "tasks": len(scheduler.tasks),
            "clock": clock,
            "wrapper": wrapper,
            "timed": {name: [one.calls, one.nanoseconds] for name, one in timed.items()},
            "recounts": 0 if mode == "none" else scheduler.plugins[PLUGIN_NAME].counter.recounts,
        }

    scheduler.handlers["bench_times"] = times
    print(scheduler.address, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    os._exit(0)  # its workers are gone, or going


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
