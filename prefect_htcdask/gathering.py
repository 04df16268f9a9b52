"""When the results of futures are gathered, and how many at a time: decisions alone, without any I/O.

A gather is one round trip through the scheduler, which costs client, scheduler and workers about as much CPU time for
one result as for a hundred small ones.
"""

from __future__ import annotations

MAX_BATCH = 200
"""Futures of one gather at most, where their results are small; with so many ready, none waits for more."""

GATHER_BYTES = 64 * 1024**2
"""Bytes of results in one gather, about: they pass the scheduler, which holds those of a gather all at once."""

UNKNOWN_BYTES = 4 * 1024**2
"""For how large a result is taken before any was seen."""

INTERVAL = 0.05
"""Seconds from one gather to the next, where many futures are asked for: what is ready by then comes in one."""

AWAITED_INTERVAL = 0.02
"""The same where a thread blocks on one of those that are ready, as on each of many in turn."""

FEW = 8
"""With so many futures asked for at most, as by a flow that submits a task for each that has ended, none waits."""


def batch_limit(result_bytes: float) -> int:
    """How many results are gathered at a time, where one has that many bytes."""
    return max(1, min(MAX_BATCH, int(GATHER_BYTES / max(1.0, result_bytes))))


def expected_bytes(expected: float, seen: float) -> float:
    """How large a result is expected to be: no smaller than those just seen, and small again after a few gathers."""
    return max(seen, expected / 4)


def held_back(ready: int, asked: int, awaited: bool, since: float, limit: int = MAX_BATCH) -> float:
    """For how many seconds futures that are ready wait for others, to be gathered in one round trip with them.

    Args:
        ready: how many are ready.
        asked: how many are asked for, ready or not.
        awaited: whether a thread blocks on one of those that are ready.
        since: seconds since the last gather began.
        limit: how many are gathered at a time; with so many ready, none waits.
    """
    if asked <= FEW or ready >= limit:
        return 0.0
    return max(0.0, (AWAITED_INTERVAL if awaited else INTERVAL) - since)
