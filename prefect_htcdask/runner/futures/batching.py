"""When the results of futures are gathered, and how many at a time: decisions alone, without any I/O.

A gather is one round trip through the scheduler, which costs client, scheduler and workers about as much CPU time for
one result as for a hundred small ones.
"""

from __future__ import annotations

from collections.abc import Iterable

MAX_BATCH = 200
"""Futures of one gather at most, where their results are small; with so many ready, none waits for more."""

GATHER_BYTES = 64 * 1024**2
"""Bytes of results in one gather, about: they pass the scheduler, which holds those of a gather all at once."""

INTERVAL = 0.05
"""Seconds from one gather to the next, at least, where many futures are asked for: what is ready comes in one."""

LONGEST_INTERVAL = 0.5
"""The same at most."""

INTERVAL_OF_EACH = 0.001
"""Seconds by which each future that is asked for lengthens the interval: a gather is a round trip to every worker that
has one of the results, and of many futures none is in a hurry."""

FEW = 8
"""With so many futures asked for at most, as by a flow that submits a task for each that has ended, none waits."""


def batch_size(result_bytes: Iterable[float]) -> int:
    """How many of the results that are ready are gathered together.

    Args:
        result_bytes: how large each is expected to be, in the order in which they came.
    """
    size, count = 0.0, 0
    for each in result_bytes:
        size += each
        if count and size > GATHER_BYTES:
            break
        count += 1
        if count == MAX_BATCH:
            break
    return count


def interval(asked: int) -> float:
    """Seconds from one gather to the next, where so many futures are asked for."""
    return min(max(INTERVAL, INTERVAL_OF_EACH * asked), LONGEST_INTERVAL)


def batch_delay(full: bool, asked: int, awaited: bool, since: float) -> float:
    """For how many seconds futures that are ready wait for others, to be gathered in one round trip with them.

    Args:
        full: whether as many are ready as are gathered together.
        asked: how many are asked for, ready or not.
        awaited: whether a thread blocks on one of those that are ready, and not on each of many in turn.
        since: seconds since the last gather began.
    """
    if awaited or asked <= FEW or full:
        return 0.0
    return max(0.0, interval(asked) - since)
