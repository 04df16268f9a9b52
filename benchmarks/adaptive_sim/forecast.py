"""When tasks that wait for results will be ready: once all that they still need is in hand, it is a matter of time.

It is what `prefect_htcdask.scheduler.demand` keeps on the scheduler, with constant work per transition and dependent.
It looks no further than one step, since a task that is itself queued may begin at any time.
"""

from __future__ import annotations

from collections import Counter

from .trace import Trace

BUCKET = 10.0
"""Seconds that forecasts are told apart by, so that what a policy is told does not grow with the tasks."""


class Forecast:
    """Forecasts for one trace.

    A task that is late stays due until it is ready; one whose input is no longer in hand, its worker being lost, is
    forecast again when the input is.

    Attributes:
        coming: for each group, the number of tasks forecast and not ready yet, by the bucket of their time.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.not_begun = trace.dependencies()
        self.latest: dict[int, float] = {}
        self.bucket: dict[int, int] = {}
        self.mean: dict[int, float] = {}
        self.done = 0
        self.seconds = 0.0
        self.coming: dict[str, Counter[int]] = {group.name: Counter() for group in trace.groups}

    def ended(self, kind: int, seconds: float, mean: float) -> None:
        """A task of a kind has ended that took so many seconds; the latest of this kind took the mean."""
        self.mean[kind] = mean
        self.done += 1
        self.seconds += seconds

    def began(self, task: int, now: float) -> None:
        """A task is in hand. Of a kind that has never ended yet, it is taken to last as long as others do."""
        if task not in self.trace.dependents:
            return
        mean = self.mean.get(self.trace.kind_of[task])
        end = now + (self.seconds / max(1, self.done) if mean is None else mean)
        for dependent in self.trace.dependents[task]:
            self.not_begun[dependent] -= 1
            self.latest[dependent] = max(end, self.latest.get(dependent, 0.0))
            if not self.not_begun[dependent]:
                self.bucket[dependent] = bucket = int(self.latest[dependent] // BUCKET)
                self._coming(dependent)[bucket] += 1

    def lost(self, task: int) -> None:
        """A task is in hand no more, though it has not ended."""
        for dependent in self.trace.dependents.get(task, ()):
            self.not_begun[dependent] += 1
            self._uncount(dependent)

    def ready(self, task: int) -> None:
        """A task is ready."""
        self._uncount(task)

    def _uncount(self, task: int) -> None:
        bucket = self.bucket.pop(task, None)
        if bucket is None:
            return
        coming = self._coming(task)
        coming[bucket] -= 1
        if not coming[bucket]:
            del coming[bucket]

    def _coming(self, task: int) -> Counter[int]:
        return self.coming[self.trace.kinds[self.trace.kind_of[task]].group]
