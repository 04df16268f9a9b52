"""What to change, as far as the numbers of a flow run tell: pure rules over what `report.progress` accounts for.

Each rule is about one worker group and gives at most one sentence, which names the setting. A rule keeps silent where
there is too little to go by: who is told of trifles reads no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Account = Mapping[str, Any]

SMALLEST_REQUEST = 256
"""MiB that a worker with Dask and Prefect needs in any case."""

HEADROOM = 1.25
"""Times the peak that a request should be."""

TOO_MUCH = 2.0
"""Times the request that would do, from which on a smaller one is worth the words."""

FEW_CORE_HOURS = 0.1
"""Core-hours that are not worth a thought."""

LONG_WAIT = 120.0
LONG_BOOT = 60.0
SHORT_TASK = 0.2
"""Seconds."""


def recommend(account: Account) -> list[str]:
    """What to change, the most telling first.

    Args:
        account: the summary's `report`.
    """
    several = len(account["groups"]) > 1
    return [
        f"**{name}**: {sentence}" if several else sentence
        for rule in RULES
        for name, group in account["groups"].items()
        for sentence in rule(group)
    ]


def next_size(needed: float) -> int:
    """The smallest of 256, 384, 512, 768, 1024, 1536, ... MiB that is enough, and at least `SMALLEST_REQUEST`."""
    size = float(SMALLEST_REQUEST)
    while size < needed:
        size *= 1.5 if math.log2(size).is_integer() else 4 / 3
    return round(size)


def mib(size: float) -> str:
    """A size for people, from MiB: ``310 MiB``, ``2 GiB``."""
    return f"{size:.0f} MiB" if size < 1024 else f"{size / 1024:.3g} GiB"


def seconds(duration: float) -> str:
    """A duration for people: ``0.4 s``, ``12 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if duration < 60:
        return f"{duration:.2g} s" if duration < 10 else f"{min(59, round(duration))} s"
    minutes, rest = divmod(round(duration), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"


def efficiency(group: Account) -> float | None:
    """Task-seconds over worker-seconds times threads; `None` where no worker ran. At most 1: tasks may leave their
    threads and run on.
    """
    available = group["worker_seconds"] * group["threads"]
    return min(1.0, group["task_seconds"] / available) if available > 0 else None


def wasted_core_hours(group: Account) -> float:
    """Core-hours of threads without a task."""
    used = core_hours(group)
    share = efficiency(group)
    return used * (1 - share) if share is not None else 0.0


def core_hours(group: Account) -> float:
    """Core-hours that the jobs had their slots."""
    return float(group["worker_seconds"] * group["cpus"] / 3600)


def memory(group: Account) -> Iterator[str]:
    """The request is far above the peak, or hardly above it."""
    peak, request = group["peak_memory_mib"], group["memory_mib"]
    if not peak:
        return
    setting = f"`{group['settings']}.memory` (request_memory)"
    enough = next_size(HEADROOM * peak)
    if TOO_MUCH * enough <= request:
        yield f"peak memory {mib(peak)} of {mib(request)} requested: {setting} could be {mib(enough)}"
    elif peak > 0.9 * request:
        yield f"peak memory {mib(peak)} of {mib(request)} requested is close: {setting} should rather be {mib(enough)}"


def holds(group: Account) -> Iterator[str]:
    """Jobs were held."""
    if group["holds"]:
        times = "once" if group["holds"] == 1 else f"{group['holds']} times"
        yield f"worker jobs were held {times}: the table of HTCondor jobs says why, and what to do"


def never_started(group: Account) -> Iterator[str]:
    """Jobs were asked for in vain."""
    vain = group["jobs"] - group["started"]
    if vain > 0.5 * group["jobs"] and vain > 2:
        yield (
            f"{vain} of {group['jobs']} worker jobs never started: smaller workers (`{group['settings']}.cpus`, "
            "`.memory`) fit more slots; or lower `adaptive.maximum`"
        )


def queue_wait(group: Account) -> Iterator[str]:
    """Jobs wait for long."""
    wait = group["wait_median"]
    if wait is not None and wait > LONG_WAIT:
        yield (
            f"half of the worker jobs waited {seconds(wait)} or longer for a slot: smaller workers "
            f"(`{group['settings']}.cpus`, `.memory`) fit more slots; another `.accounting_group` or `.priority` "
            "may be served sooner"
        )


def boot(group: Account) -> Iterator[str]:
    """Workers take long to come up."""
    took = group["boot_median"]
    if took is not None and took > LONG_BOOT:
        yield (
            f"a worker takes {seconds(took)} from its job's start until it joins: a smaller environment or container "
            "image, or one that is on the hosts already, would help"
        )


def evictions(group: Account) -> Iterator[str]:
    """Many workers lost their slots."""
    if group["evictions"] > 2 and group["evictions"] > 0.2 * group["started"]:
        yield (
            f"workers lost their slots {group['evictions']} times, and began what they ran again elsewhere: shorter "
            f"tasks lose less, and a `{group['settings']}.lifetime` below the time that the pool grants loses nothing"
        )


def short_tasks(group: Account) -> Iterator[str]:
    """Tasks are too short to be worth their way."""
    done = group["done"]
    mean = group["task_seconds"] / done if done else math.inf
    if done >= 100 and mean < SHORT_TASK:
        yield f"{done} tasks took {seconds(mean)} each on average: more work in each task leaves less to overheads"


def idle(group: Account) -> Iterator[str]:
    """Workers had nothing to do for a large part of their time, or threads of busy workers had not."""
    share = efficiency(group)
    if share is None or share > 0.6 or wasted_core_hours(group) < FEW_CORE_HOURS:
        return
    joined = group["running_seconds"] + group["idle_seconds"]
    idle_share = group["idle_seconds"] / joined if joined else 0.0
    if idle_share > 0.3:
        yield (
            f"workers had no task in {100 * idle_share:.0f} % of their time: lower `adaptive.residence`, "
            "`adaptive.minimum` or a fixed number of workers, or submit work earlier"
        )
    elif group["threads"] > 1:
        yield (
            f"busy workers used {100 * share:.0f} % of their {group['threads']} threads: tasks that use several cores "
            f"themselves are served by fewer `{group['settings']}.nthreads`, others by fewer `.cpus`"
        )


RULES: tuple[Callable[[Account], Iterator[str]], ...] = (
    holds,
    memory,
    idle,
    queue_wait,
    never_started,
    evictions,
    boot,
    short_tasks,
)
