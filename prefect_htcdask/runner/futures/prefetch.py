"""Asks for the results that somebody is about to ask for, who takes one after another in the order of their submits.

``[future.result() for future in futures]`` names one future at a time, and each state would come home alone. After a
few in turn, the next of the same task are asked for as well, as many as were taken, as a file system reads ahead; only
where that task's results are small, for large ones stay on their workers until they are asked for.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import Any, Generic, Protocol, TypeVar

IN_TURN = 8
"""So many have to be taken in the order of their submits first."""

WINDOW = 512
"""Futures that are asked for ahead, at most: 32 MiB of results. Gathers of so many are as far apart as can be."""

SMALL = 64 * 1024
"""Bytes of a result, at most, as others have been."""


class FollowedFuture(Protocol):
    """What stands in a row.

    Attributes:
        task_name: what it is a result of.
        place: its number in the row.
        following: the one that was submitted next, if that is still there.
    """

    task_name: str
    place: int
    following: weakref.ref[Any] | None


L = TypeVar("L", bound=FollowedFuture)


class Prefetcher(Generic[L]):
    """The order in which futures were submitted, and how they are taken."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: weakref.ref[L] | None = None
        self._count = 0
        self._taken = 0
        self._in_turn = 0
        self._until: weakref.ref[L] | None = None
        self._asked = 0

    def follow(self, futures: Iterable[L]) -> None:
        """Take futures that were just submitted."""
        with self._lock:
            last = self._last() if self._last is not None else None
            for future in futures:
                self._count += 1
                future.place = self._count
                if last is not None:
                    last.following = weakref.ref(future)
                last = future
            self._last = weakref.ref(last) if last is not None else None

    def take(self, future: L) -> bool:
        """Whether somebody who waits for a future takes one after the other in the order of their submits."""
        with self._lock:
            place, taken = future.place, self._taken
            if place and place != taken:
                self._taken = place
                # Of those that were asked for ahead, whoever finds the states in hand does not wait.
                if taken < place <= max(taken, self._asked) + 1:
                    self._in_turn += place - taken
                else:
                    self._in_turn, self._asked = 1, 0
            return bool(place) and self._in_turn >= IN_TURN

    def beside(self, future: L, result_bytes: float) -> list[L]:
        """The futures to ask for ahead, where one is taken in turn.

        Args:
            future: what is waited for.
            result_bytes: how large a result of its task is, as far as can be told.
        """
        with self._lock:
            place, window = future.place, min(self._in_turn, WINDOW)
            if result_bytes > SMALL or self._asked > place + window // 2:
                return []
            last: L | None = self._until() if self._until is not None and self._asked > place else future
            ahead: list[L] = []
            while last is not None and last.place < place + window:
                last = last.following() if last.following is not None else None
                if last is None or last.task_name != future.task_name:
                    break
                ahead.append(last)
            if ahead:
                self._until, self._asked = weakref.ref(ahead[-1]), ahead[-1].place
            return ahead
