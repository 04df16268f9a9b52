"""Waiting for a condition, with a deadline that a busy machine keeps too."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 6
"""How many times as slow as an idle one a machine may be: what waits for an event waits so many times as long."""


def slowness() -> float:
    """How many processes want each core of this machine now, and so how much longer things take; 1 where it is idle."""
    return max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


def wait_until(condition: Callable[[], T], timeout: float, what: str, pause: float = 0.1) -> T:
    """Wait until `condition()` is true and return what it gave; fails after `timeout` seconds, saying `what`.

    The timeout is that of an idle machine; the wait itself is `PATIENCE` times as long.
    """
    timeout *= PATIENCE
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:.0f} s: {what} (last seen: {value!r})")
        time.sleep(pause)
