"""How large the results of tasks are, by the names of the tasks, as far as some of them have been seen.

An estimate, made in the client's event loop: it runs none of the results' own code, such as pickling would, and looks
at a few hundred objects at most. What it cannot look into is taken for large.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable
from itertools import islice
from numbers import Number
from types import FunctionType
from typing import Any

from dask.sizeof import sizeof

LARGE = 4 * 1024**2
"""Bytes for which a result is taken whose like was never seen, or that cannot be looked into."""

SAMPLES = 4
"""Results of one name that are looked at in one gather."""

MOST_LOOKS = 300
"""Objects of one result that are looked at."""

FIRST = 20
"""Elements of a collection that speak for all."""

DEEPEST = 8

_NAMES = 256
_UNKNOWN = sizeof.dispatch(object)


def estimated_size(value: Any) -> float:
    """How large a value is with all that is in it, in bytes."""
    return _Look().at(value, 0)


class _Look:
    def __init__(self) -> None:
        self._left = MOST_LOOKS

    def at(self, value: Any, depth: int) -> float:
        self._left -= 1
        if self._left < 0 or depth > DEEPEST:
            return LARGE
        kind = type(value)
        # Never `isinstance`, which asks the value for its class.
        if issubclass(kind, dict):
            return sys.getsizeof(value) + self._of(dict.keys(value), depth) + self._of(dict.values(value), depth)
        if issubclass(kind, (list, tuple, set, frozenset, deque)):
            return sys.getsizeof(value) + self._of(value, depth)
        try:
            # Arrays and tables, as Dask knows them.
            if sizeof.dispatch(kind) is not _UNKNOWN:
                return float(sizeof(value))
            if issubclass(kind, Number) or kind.__module__ == "numpy":
                return float(getattr(value, "nbytes", 0) or sys.getsizeof(value))
            if issubclass(kind, type) or kind.__module__.partition(".")[0] in sys.stdlib_module_names:
                return sys.getsizeof(value)
            if _all_python(kind):
                return sys.getsizeof(value) + self._of(object.__getattribute__(value, "__dict__").values(), depth)
        except Exception:
            return LARGE
        return LARGE

    def _of(self, values: Collection[Any], depth: int) -> float:
        if not values:
            return 0.0
        seen = [self.at(one, depth + 1) for one in islice(values, FIRST)]
        return sum(seen) / len(seen) * len(values)


def _all_python(kind: type) -> bool:
    """Whether objects of a class have all that they hold in their ``__dict__``: what is made in C has more."""
    made_by = [vars(one).get("__new__") for one in kind.__mro__[:-1]]
    return all(new is None or isinstance(new, (staticmethod, FunctionType)) for new in made_by)


class ResultSizes:
    """What was seen. The latest names are remembered."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._expected: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def saw(self, results: Iterable[tuple[str, Any]]) -> None:
        """Take results, each with the name of its task.

        As large as the largest seen are others expected to be; smaller ones only after a few times without any.
        """
        by_name: dict[str, list[Any]] = {}
        for name, result in results:
            by_name.setdefault(name, []).append(result)
        for name, group in by_name.items():
            largest = max(estimated_size(result) for result in group[:: -(-len(group) // SAMPLES)])
            with self._lock:
                before, count = self._expected.get(name, (0.0, 0))
                self._expected[name] = max(largest, before / 4), count + len(group)
                self._expected.move_to_end(name)
                if len(self._expected) > _NAMES:
                    self._expected.popitem(last=False)

    def expected(self, name: str) -> float:
        """How large a result of a task of that name is expected to be, in bytes; the first small ones prove little."""
        with self._lock:
            size, count = self._expected.get(name, (0.0, 0))
        return max(size, LARGE / max(1, count) ** 2)
