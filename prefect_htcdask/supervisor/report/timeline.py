"""How many tasks were queued and how many workers there were, over the life of a cluster, in bounded memory. Pure.

What is seen at one moment holds until the next. Steps are means over equal times; when there are too many, each two
become one of twice the length, so that a run of days is told as well as one of seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MOST_STEPS = 240
LONGEST_HOLD = 60.0
"""Seconds that something seen is taken to last at most: of the time in which a host was asleep nothing is known."""


class Workers(NamedTuple):
    """Workers of a group: *pending* are submitted and not at the scheduler yet, *running* have a task, *idle* none."""

    pending: int = 0
    running: int = 0
    idle: int = 0


class Timeline:
    """The steps so far.

    Args:
        groups: names of the worker groups.
        start: when it begins, Unix time in seconds.
        step: length of the first steps in seconds.
        most: steps at most; even.
    """

    def __init__(self, groups: Sequence[str], start: float, step: float = 1.0, most: int = MOST_STEPS) -> None:
        self.groups = tuple(groups)
        self.start = start
        self.step = step
        self._most = most
        # For each step the seconds that are known of it, and each quantity times these.
        self._known: list[float] = []
        self._sums: list[list[float]] = []
        self._seen: list[float] | None = None
        self._since = start

    def saw(self, when: float, queued: int, workers: Mapping[str, Workers]) -> None:
        """Take in what there is now.

        Args:
            when: Unix time in seconds; what is older than the last is taken as of then.
            queued: tasks that are ready and have no worker.
            workers: the workers of each group.
        """
        self.until(when)
        self._seen = [float(queued), *(float(n) for name in self.groups for n in workers.get(name, Workers()))]

    def until(self, when: float) -> None:
        """Let what was seen last hold until now."""
        begun = self._since
        self._since = max(when, begun)
        if self._seen is not None:
            end = min(self._since, begun + LONGEST_HOLD)
            while begun < end:
                begun = self._fill(begun, end, self._seen)

    def _fill(self, begun: float, end: float, seen: list[float]) -> float:
        """Add what was seen to the step that `begun` is in; returns when that step, or the time to be filled, ends."""
        index = int((begun - self.start) // self.step)
        while index >= self._most:
            self._halve()
            index = int((begun - self.start) // self.step)
        while len(self._known) <= index:
            self._known.append(0.0)
            self._sums.append([0.0] * len(seen))
        until = min(end, self.start + (index + 1) * self.step)
        if until <= begun:  # the two are the same number but for rounding
            until = end
        self._known[index] += until - begun
        sums = self._sums[index]
        for position, value in enumerate(seen):
            sums[position] += value * (until - begun)
        return until

    def _halve(self) -> None:
        self.step *= 2
        if len(self._known) % 2:
            self._known.append(0.0)
            self._sums.append([0.0] * len(self._sums[0]))
        self._known = [first + second for first, second in zip(self._known[::2], self._known[1::2], strict=True)]
        pairs = zip(self._sums[::2], self._sums[1::2], strict=True)
        self._sums = [[a + b for a, b in zip(first, second, strict=True)] for first, second in pairs]

    def told(self) -> dict[str, Any]:
        """`start` (Unix time) and `step` in seconds, and for each step, `None` where nothing is known of it: `queued`,
        and under `workers` for each group `pending`, `running` and `idle`.
        """
        means = [
            [round(value / seconds, 2) for value in sums] if seconds > 0 else [None] * (1 + 3 * len(self.groups))
            for seconds, sums in zip(self._known, self._sums, strict=True)
        ]
        columns = [list(column) for column in zip(*means, strict=True)] or [[]] * (1 + 3 * len(self.groups))
        return {
            "start": self.start,
            "step": self.step,
            "queued": columns[0],
            "workers": {
                name: dict(zip(Workers._fields, columns[1 + 3 * index : 4 + 3 * index], strict=True))
                for index, name in enumerate(self.groups)
            },
        }

    def seconds(self) -> dict[str, Workers]:
        """Seconds that the workers of each group were pending, running and idle, all together."""
        totals = [round(sum(column)) for column in zip(*self._sums, strict=True)] or [0] * (1 + 3 * len(self.groups))
        return {name: Workers(*totals[1 + 3 * index : 4 + 3 * index]) for index, name in enumerate(self.groups)}
