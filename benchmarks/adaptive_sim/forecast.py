"""When tasks that wait for results will be ready: once all that they still need is in hand, it is a matter of time.

It is what a plugin on the scheduler can keep with constant work per transition and dependent. It looks no further than
one step, since a task that is itself queued may begin at any time.
"""

from __future__ import annotations

from collections import Counter

from .trace import Trace

BUCKET = 10.0
"""Seconds that forecasts are told apart by, so that what a policy is told does not grow with the tasks."""


class Forecast:
    """Forecasts for one trace.

    Each task is forecast once; one that is late, or whose input an eviction took, stays due until it is ready.

    Attributes:
        coming: for each group, the number of tasks forecast and not ready yet, by the bucket of their time.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.not_begun = trace.dependencies()
        self.latest: dict[int, float] = {}
        self.bucket: dict[int, int] = {}
        self.begun: set[int] = set()
        self.seconds: dict[int, float] = {}
        self.any_seconds = 0.0
        self.coming: dict[str, Counter[int]] = {group.name: Counter() for group in trace.groups}

    def ended(self, kind: int, seconds: float) -> None:
        """A task of a kind has ended; tasks of this kind take so many seconds on average."""
        self.seconds[kind] = self.any_seconds = seconds

    def began(self, task: int, now: float) -> None:
        """A task is in hand. Of a kind that has never ended yet, it is taken to last as long as others do."""
        if task not in self.trace.dependents or task in self.begun:
            return
        self.begun.add(task)
        end = now + self.seconds.get(self.trace.kind_of[task], self.any_seconds)
        for dependent in self.trace.dependents[task]:
            self.not_begun[dependent] -= 1
            self.latest[dependent] = max(end, self.latest.get(dependent, 0.0))
            if not self.not_begun[dependent]:
                self.bucket[dependent] = bucket = int(self.latest.pop(dependent) // BUCKET)
                self._coming(dependent)[bucket] += 1

    def ready(self, task: int) -> None:
        """A task is ready."""
        bucket = self.bucket.pop(task, None)
        if bucket is None:
            return
        coming = self._coming(task)
        coming[bucket] -= 1
        if not coming[bucket]:
            del coming[bucket]

    def _coming(self, task: int) -> Counter[int]:
        return self.coming[self.trace.kinds[self.trace.kind_of[task]].group]
