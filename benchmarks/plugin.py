"""The scheduler plugin's share of the scheduler's CPU time, during 50,000 no-op Dask tasks.

Measured in two ways. Inside: the thread's CPU time in the plugin's `transition` and in its answers, against that of the
scheduler's whole process in the same run. Beside: the scheduler's CPU time with the plugin and without, in turns; the
noise of such differences is larger than the plugin's part, so that it bounds it from above at best.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distributed import Client, wait
from distributed.core import rpc

from benchmarks.result import Result

TASKS = int(os.environ.get("BENCH_PLUGIN_TASKS", "50000"))
REPEATS = int(os.environ.get("BENCH_PLUGIN_REPEATS", "1"))
WORKERS = 2
POLLS_EVERY = 1.0
"""Seconds between two questions for demand: the supervisor's default interval."""
GOAL = 0.03


def run() -> Result:
    """Measure, in turns, without the plugin, with it, and inside it."""
    cpu: dict[str, list[float]] = {"none": [], "plugin": [], "timed": []}
    shares: list[float] = []
    inside: dict[str, Any] = {}
    for repeat in range(REPEATS):
        for mode, seconds in cpu.items():
            spent = asyncio.run(_measure(mode, _independent))
            seconds.append(spent["cpu"])
            if mode == "timed":
                shares.append(spent["share"])
                inside = spent
            print(f"{repeat + 1}/{REPEATS} {mode}: {_words(spent)}", file=sys.stderr, flush=True)
    chained = asyncio.run(_measure("timed", _with_inputs))
    print(f"with inputs: {_words(chained)}", file=sys.stderr, flush=True)
    without, with_plugin = (statistics.median(cpu[mode]) for mode in ("none", "plugin"))
    share = statistics.median(shares)
    return Result(
        "plugin",
        metrics={
            "tasks": TASKS,
            "share": share,
            "share_of_each_run": shares,
            "share_with_inputs": chained["share"],
            "calls_per_task": inside["calls"] / TASKS,
            "seconds_per_call": inside["seconds_per_call"],
            "seconds_per_call_with_inputs": chained["seconds_per_call"],
            "seconds_per_answer": inside["seconds_per_answer"],
            "scheduler_cpu_seconds": with_plugin,
            "difference": with_plugin / without - 1,
            "spread_without": (max(cpu["none"]) - min(cpu["none"])) / without,
        },
        peers={"no plugin": {"scheduler_cpu_seconds": without, "scheduler_cpu_seconds_of_each_run": cpu["none"]}},
        goal={"share_below": GOAL},
        checks={"share": share < GOAL},
    )


def _words(spent: dict[str, Any]) -> str:
    words = f"{spent['cpu']:.2f} s of the scheduler's CPU time"
    if "share" in spent:
        words += f", {100 * spent['share']:.2f} % in the plugin, {1e9 * spent['seconds_per_call']:.0f} ns per call"
    return words


async def _measure(mode: str, submit: Any) -> dict[str, Any]:
    with _processes(mode) as address:
        async with (
            rpc(address) as remote,
            Client(address, asynchronous=True) as client,
        ):
            await client.wait_for_workers(WORKERS)
            await wait(client.map(_nothing, range(100), pure=False))
            polls = None
            if mode != "none":
                granted = await remote.htcdask_claim(owner="bench")
                polls = asyncio.ensure_future(_poll(remote, granted["epoch"]))
            while (before := await remote.bench_times())["tasks"]:
                await asyncio.sleep(0.1)
            last = submit(client)
            await wait(last)
            del last
            while (after := await remote.bench_times())["tasks"]:
                await asyncio.sleep(0.1)
            if polls is not None:
                polls.cancel()
    return _spent(before, after)


async def _poll(remote: Any, epoch: int) -> None:
    while True:
        answer = await remote.htcdask_demand(owner="bench", epoch=epoch)
        assert answer["status"] == "ok"
        await asyncio.sleep(POLLS_EVERY)


def _spent(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    assert after["recounts"] == 0, "the plugin's counts were wrong"
    cpu = after["cpu"] - before["cpu"]
    if not after["timed"]:
        return {"cpu": cpu}
    calls, seconds = {}, {}
    for name, (count, nanoseconds) in after["timed"].items():
        calls[name] = count - before["timed"][name][0]
        seconds[name] = 1e-9 * (nanoseconds - before["timed"][name][1] - calls[name] * after["clock"])
    # The scheduler's time, as it would be were the plugin not timed.
    cpu -= 1e-9 * sum(calls.values()) * after["wrapper"]
    return {
        "cpu": cpu,
        "calls": calls["transition"],
        "seconds_per_call": seconds["transition"] / calls["transition"],
        "seconds_per_answer": seconds["demand"] / max(1, calls["demand"]),
        "share": sum(seconds.values()) / cpu,
    }


@contextmanager
def _processes(mode: str) -> Iterator[str]:
    """A scheduler and workers, each in a process of its own, while the block lasts."""
    scheduler = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.plugin_scheduler", mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    workers: list[subprocess.Popen[bytes]] = []
    try:
        assert scheduler.stdout is not None and scheduler.stdin is not None
        address = scheduler.stdout.readline().strip()
        if not address:
            raise RuntimeError("the scheduler did not start")
        options = ["--no-nanny", "--nthreads", "1", "--no-dashboard", "--host", "127.0.0.1", "--death-timeout", "60"]
        for number in range(WORKERS):
            command = [sys.executable, "-m", "dask", "worker", address, "--name", f"htcdask-{number}.0", *options]
            workers.append(subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL))
        yield address
    finally:
        for process in (*workers, scheduler):
            process.terminate()
        for process in (*workers, scheduler):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _nothing(*inputs: Any) -> None:
    """A no-op task."""


def _independent(client: Client) -> list[Any]:
    futures: list[Any] = client.map(_nothing, range(TASKS), pure=False)
    return futures


def _with_inputs(client: Client) -> list[Any]:
    """As many tasks in five layers, each with two inputs of the layer before."""
    width = TASKS // 5
    layer: list[Any] = client.map(_nothing, range(width), pure=False)
    for _ in range(4):
        layer = client.map(_nothing, layer, layer[1:] + layer[:1], pure=False)
    return layer
