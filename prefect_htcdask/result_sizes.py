"""How large the results of tasks are, by the names of the tasks, as far as some of them have been seen.

Python cannot say how large an object is with all that is in it; its pickle can. That is broken off where it is clear
that the result is large, and arrays are counted without being copied.
"""

from __future__ import annotations

import pickle
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import cloudpickle

LARGE = 4 * 1024**2
"""Bytes from which on nothing is counted any more, and for how large a result is taken whose like was never seen."""

SAMPLES = 4
"""Results of one name that are looked at in one gather."""

_NAMES = 256
_SIMPLE = (type(None), bool, int, float, str, bytes)


class _Enough(Exception):
    """It is large."""


class _Counter:
    """A file that only counts."""

    def __init__(self, limit: int) -> None:
        self.size = 0
        self._limit = limit

    def write(self, data: Any) -> int:
        return self.add(memoryview(data).nbytes)

    def add(self, size: int) -> int:
        self.size += size
        if self.size > self._limit:
            raise _Enough
        return size


def pickled_size(value: Any, limit: int = LARGE) -> int:
    """How large a pickle of `value` is, in bytes; `limit` where it is larger, or where there is none."""
    if type(value) in _SIMPLE:
        return min(limit, len(value) if isinstance(value, (str, bytes)) else 8)
    counter = _Counter(limit)
    try:
        cloudpickle.Pickler(counter, pickle.HIGHEST_PROTOCOL, lambda part: not counter.add(part.raw().nbytes)).dump(
            value
        )
    except Exception:
        return limit
    return counter.size


class ResultSizes:
    """What was seen. The latest names are remembered."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._expected: OrderedDict[str, float] = OrderedDict()

    def saw(self, name: str, results: Sequence[Any]) -> None:
        """Take results of tasks of one name: of the largest seen, and small again after a few times without any."""
        every = max(1, len(results) // SAMPLES)
        seen = max(pickled_size(result) for result in results[::every])
        with self._lock:
            self._expected[name] = max(float(seen), self._expected.get(name, seen) / 4)
            self._expected.move_to_end(name)
            if len(self._expected) > _NAMES:
                self._expected.popitem(last=False)

    def expected(self, name: str) -> float:
        """How large a result of a task of that name is expected to be, in bytes."""
        with self._lock:
            return self._expected.get(name, LARGE)
