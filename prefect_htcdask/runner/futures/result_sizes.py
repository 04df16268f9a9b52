"""How large the results of tasks are, by the names of the tasks, as far as some of them have been seen.

An estimate, made in the client's event loop: it runs none of the results' own code, such as pickling would, and looks
at a few hundred objects at most. What it cannot look into is taken for large.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from types import FunctionType, MemberDescriptorType, ModuleType
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
        try:
            return self._at(value, type(value), depth)
        except Exception:
            # Such as a collection that its owner changes just now.
            return LARGE

    def _at(self, value: Any, kind: type[Any], depth: int) -> float:
        # Never `isinstance`, which asks the value for its class; and the methods of the builtins themselves.
        for base in (list, tuple, set, frozenset, deque):
            if issubclass(kind, base):
                elements = self._of(base.__iter__(value), base.__len__(value), depth)
                return base.__sizeof__(value) + elements + self._attributes(value, kind, depth)
        if issubclass(kind, dict):
            count = dict.__len__(value)
            entries = self._of(dict.keys(value), count, depth) + self._of(dict.values(value), count, depth)
            return dict.__sizeof__(value) + entries + self._attributes(value, kind, depth)
        for simple in (str, bytes, bytearray):
            if issubclass(kind, simple):
                return simple.__sizeof__(value) + self._attributes(value, kind, depth)
        if issubclass(kind, (type, FunctionType, ModuleType)):
            # It travels by its name, or is small.
            return object.__sizeof__(value)
        if sizeof.dispatch(kind) is not _UNKNOWN:
            # Arrays and tables, as Dask knows them; but not what an array refers to.
            return LARGE if str(getattr(value, "dtype", "")) == "object" else float(sizeof(value))
        if issubclass(kind, memoryview) or kind.__module__ == "numpy":
            return float(value.nbytes)
        return object.__sizeof__(value) + self._attributes(value, kind, depth) if _shows_all(kind) else LARGE

    def _attributes(self, value: Any, kind: type[Any], depth: int) -> float:
        size = 0.0
        with suppress(AttributeError):
            for inside in tuple(object.__getattribute__(value, "__dict__").values()):
                size += self.at(inside, depth + 1)
        for one in kind.__mro__:
            for name, member in vars(one).items():
                if type(member) is MemberDescriptorType and name not in ("__dict__", "__weakref__"):
                    with suppress(AttributeError):
                        size += self.at(member.__get__(value), depth + 1)
        return size

    def _of(self, values: Iterable[Any], count: int, depth: int) -> float:
        seen = [self.at(one, depth + 1) for one in islice(values, FIRST)]
        return sum(seen) / len(seen) * count if seen else 0.0


def _shows_all(kind: type[Any]) -> bool:
    """Whether all that objects of a class hold is among their attributes: what an extension made holds more."""
    for one in kind.__mro__[:-1]:
        ours = one.__module__.partition(".")[0] in sys.stdlib_module_names
        new = vars(one).get("__new__")
        if not ours and new is not None and not isinstance(new, (staticmethod, FunctionType)):
            return False
    return True


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
