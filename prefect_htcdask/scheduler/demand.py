"""Counts the tasks that want a thread, on the Dask scheduler, transition by transition.

Each transition costs constant work, and a task with inputs one step for each of them when it begins to wait, when the
input begins and when it ends. Nothing is left for the question itself but to put the answer together.

It travels by value to the scheduler (see `demand`): it imports nothing of this package but what does too.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from itertools import islice
from time import monotonic
from typing import Any

from prefect_htcdask.scheduler.task_kinds import GroupCounts, TaskKind, TaskKinds

logger = logging.getLogger("distributed.scheduler")

BUCKET = 10
"""Seconds that forecasts are told apart by, so that the answer does not grow with the tasks."""

FARTHEST = 3600
"""Seconds: what is forecast for later than that, or as long ago, is told as if for then."""

SAMPLE = 32
"""Tasks of one worker that are looked at, at most, to tell what is stacked on it."""

LOOKED_AT = 20_000
"""About so many are looked at on all workers together, for one answer."""

RECOUNT_PAUSE = 100
"""Times as long as counting anew took, until it may be done again: should counts ever be wrong all the time, the site's
scheduler has other things to do."""


class WaitingTask:
    """A task that waits for inputs.

    Attributes:
        begun: how many of the inputs that it waits for are in hand.
        latest: when the last of those is expected to end, on the monotonic clock.
        bucket: that of its forecast, once all are in hand.
    """

    __slots__ = ("begun", "bucket", "group", "latest", "task")

    def __init__(self, task: Any, group: GroupCounts) -> None:
        self.task = task
        self.group = group
        self.begun = 0
        self.latest = 0.0
        self.bucket: int | None = None


class DemandCounter:
    """The tasks of a scheduler, by worker group.

    What a task counts as is kept with its key, and taken back by that, whatever states the scheduler then names: a
    task whose inputs exceed a worker's memory, say, is reported first as leaving a worker and then as never sent there.

    Args:
        scheduler: the scheduler, whose tasks are counted as they are now.
        offers: the resources that one worker of each group offers; `None` or empty: one group, which all tasks belong
            to.

    Attributes:
        last_busy: when each worker was last known to have a task, by its address, on the monotonic clock.
        recounts: how often the counts turned out wrong and were made anew.
        recount_pause: times as long as that took, until it may be done again.
    """

    def __init__(self, scheduler: Any, offers: Mapping[str, Mapping[str, float]] | None = None) -> None:
        self.scheduler = scheduler
        self.tasks: Mapping[Hashable, Any] = scheduler.tasks
        self.kinds = TaskKinds(offers or {})
        self._kind_of = self.kinds.kind_of
        self.last_busy: dict[str, float] = {}
        self.recounts = 0
        self.recount_pause: float = RECOUNT_PAUSE
        self._ready: dict[Hashable, TaskKind] = {}
        self._in_hand: dict[Hashable, tuple[TaskKind, float]] = {}
        self._waiting: dict[Hashable, WaitingTask] = {}
        self._coming = 0
        self._recount_after = 0.0
        self.count()

    def count(self) -> None:
        """Count all tasks from scratch; what ended ones have taught stays."""
        self.tasks = self.scheduler.tasks
        self.kinds.clear()
        self._ready.clear()
        self._in_hand.clear()
        self._waiting.clear()
        self._coming = 0
        waiting = []
        for key, task in self.tasks.items():
            if task.state == "waiting":
                waiting.append(key)
            elif task.state in ("processing", "queued", "no-worker"):
                self.transition(key, "", task.state)
        for key in waiting:
            self.transition(key, "", "waiting")

    def check(self) -> None:
        """Count anew if the counts do not agree with the numbers of tasks that the scheduler has, now and then."""
        scheduler = self.scheduler
        ready = len(scheduler.queued) + len(scheduler.unrunnable)
        in_hand = sum(len(ws.processing) for ws in scheduler.workers.values())
        begun = monotonic()
        if (ready != len(self._ready) or in_hand != len(self._in_hand)) and begun >= self._recount_after:
            self.recounts += 1
            logger.warning(
                "htcdask: %d ready and %d assigned tasks were counted, there are %d and %d; counting anew",
                len(self._ready),
                len(self._in_hand),
                ready,
                in_hand,
            )
            self.count()
            now = monotonic()
            self._recount_after = now + self.recount_pause * (now - begun)

    # What happens to tasks

    def transition(
        self,
        key: Hashable,
        start: str,
        finish: str,
        *args: Any,
        worker: str | None = None,
        startstops: Iterable[Mapping[str, Any]] = (),
        **kwargs: Any,
    ) -> None:
        """A task went from one state to another (`SchedulerPlugin.transition`, called for every step of every task)."""
        if start == finish:
            return
        if finish == "processing":
            kind = self._ready.pop(key, None)
            if kind is not None:
                kind.group.queued -= 1
            else:
                if self._waiting:
                    self._waits_no_more(key)
                kind = self._kind_of(self.tasks[key])
                kind.count += 1
                if kind.known:
                    kind.group.work += kind.mean
                else:
                    kind.group.unknown += 1
            began = kind, monotonic()
            self._in_hand[key] = began
            if self._waiting:
                self._begins(self.tasks[key], self._end_of(began))
        elif start == "processing":
            held = self._in_hand.pop(key, None)
            if held is None:
                self._ends_unseen(key)
                return
            kind = held[0]
            group = kind.group
            kind.count -= 1
            if kind.known:
                group.work -= kind.mean
            else:
                group.unknown -= 1
            if finish == "memory":
                self.last_busy[worker] = monotonic()  # type: ignore[index]
                seconds = 0.0
                for span in startstops:
                    if span["action"] == "compute":
                        seconds += span["stop"] - span["start"]
                duration = int(seconds * 1e6)
                group.finished += 1
                group.total += duration
                if not kind.known:
                    self.kinds.learnt(kind)
                kind.took(duration)
                if self._waiting:
                    self._ends(self.tasks[key])
            else:
                if finish == "erred":
                    seconds = 0.0
                    for span in startstops:
                        if span["action"] == "compute":
                            seconds += span["stop"] - span["start"]
                    group.failed += 1
                    group.failed_total += int(seconds * 1e6)
                if self._waiting:
                    self._fails(self.tasks[key])
        elif finish == "queued" or finish == "no-worker":
            if self._waiting:
                self._waits_no_more(key)
            self._ready[key] = kind = self._kind_of(self.tasks[key])
            kind.count += 1
            group = kind.group
            group.queued += 1
            if kind.known:
                group.work += kind.mean
            else:
                group.unknown += 1
        elif finish == "waiting":
            task = self.tasks[key]
            if task.waiting_on:
                self._waits(key, task)
        elif start == "queued" or start == "no-worker":
            self._ends_unseen(key)
        elif start == "waiting":
            if self._waiting:
                self._waits_no_more(key)
        elif start == "memory" and self._coming:
            self._is_lost(self.tasks[key])

    def _ends_unseen(self, key: Hashable) -> None:
        """A task that had no worker, as far as is known, goes: cancelled, or failed on the way to a worker."""
        kind = self._ready.pop(key, None)
        if kind is not None:
            group = kind.group
            kind.count -= 1
            group.queued -= 1
            if kind.known:
                group.work -= kind.mean
            else:
                group.unknown -= 1
        self._waits_no_more(key)

    # What is about to become ready

    def _end_of(self, held: tuple[TaskKind, float]) -> float:
        """When a task in hand is expected to end; of a name that has never ended, it takes as long as others do."""
        kind, begun = held
        return begun + 1e-6 * (kind.mean if kind.known else self.kinds.mean_of_all())

    def _waits(self, key: Hashable, task: Any) -> None:
        self._waiting[key] = record = WaitingTask(task, self._kind_of(task).group)
        in_hand = self._in_hand
        for needed in task.waiting_on:
            held = in_hand.get(needed.key)
            if held is not None:
                record.begun += 1
                record.latest = max(record.latest, self._end_of(held))
        if record.begun == len(task.waiting_on):
            self._forecast(record)

    def _waits_no_more(self, key: Hashable) -> None:
        record = self._waiting.pop(key, None)
        if record is not None and record.bucket is not None:
            self._unforecast(record)

    def _begins(self, task: Any, end: float) -> None:
        waiting = self._waiting
        for dependent in task.dependents:
            record = waiting.get(dependent.key)
            if record is not None:
                record.begun += 1
                if end > record.latest:
                    record.latest = end
                if record.begun == len(dependent.waiting_on):
                    self._forecast(record)

    def _ends(self, task: Any) -> None:
        # Its dependents no longer wait for it: whether all that they still need is in hand has not changed.
        waiting = self._waiting
        for dependent in task.dependents:
            record = waiting.get(dependent.key)
            if record is not None:
                record.begun -= 1

    def _fails(self, task: Any) -> None:
        waiting = self._waiting
        for dependent in task.dependents:
            record = waiting.get(dependent.key)
            if record is not None:
                record.begun -= 1
                if record.bucket is not None:
                    self._unforecast(record)

    def _is_lost(self, task: Any) -> None:
        """A result is gone; tasks that wait for other inputs wait for this one again."""
        waiting = self._waiting
        for dependent in task.dependents:
            record = waiting.get(dependent.key)
            if record is not None and record.bucket is not None and record.begun != len(dependent.waiting_on or ()):
                self._unforecast(record)

    def _forecast(self, record: WaitingTask) -> None:
        if record.bucket is None:
            self._coming += 1
            record.bucket = bucket = int(record.latest // BUCKET)
            coming = record.group.coming
            coming[bucket] = coming.get(bucket, 0) + 1

    def _unforecast(self, record: WaitingTask) -> None:
        bucket, record.bucket = record.bucket, None
        assert bucket is not None
        self._coming -= 1
        coming = record.group.coming
        if coming[bucket] == 1:
            del coming[bucket]
        else:
            coming[bucket] -= 1

    # What there is to tell

    def told(self, stacked: Mapping[str, int], now: float) -> dict[str, dict[str, Any]]:
        """The answer's `groups`.

        Args:
            stacked: tasks beyond what their workers run at once, by group.
            now: the time, on the monotonic clock.
        """
        mean = self.kinds.mean_of_all()
        return {
            name: {
                "queued": group.queued,
                "stacked": stacked.get(name, 0),
                "coming": _from_now(group.coming, now),
                "work": (group.work + group.unknown * mean) / 1e6,
                "unknown": group.unknown,
                "task_seconds": group.total / group.finished / 1e6 if group.finished else 0.0,
                "done": group.finished + group.failed,
                "spent": (group.total + group.failed_total) / 1e6,
            }
            for name, group in self.kinds.groups.items()
        }

    def unfinished(self) -> int:
        """Tasks that have not ended, as far as the scheduler has heard of them."""
        return len(self._ready) + len(self._in_hand) + len(self._waiting)

    def stacked_on(self, ws: Any, stacked: dict[str, int]) -> None:
        """Add the tasks that a worker has beyond what it can run at once, by group.

        Tasks with resources are never queued: they pile up on the workers that there are. Of a long pile a part is
        looked at, the smaller the more workers there are. Work stealing moves tasks without a transition, so that
        piles cannot be counted as they grow.
        """
        processing = ws.processing
        number = len(processing)
        beyond_threads = number - len(ws.long_running) - ws.nthreads
        if not self.kinds.restricted:
            if beyond_threads > 0:
                first = next(iter(self.kinds.groups))
                stacked[first] = stacked.get(first, 0) + beyond_threads
            return
        if number < 2:
            return
        in_hand = self._in_hand
        looked_at = [
            held[0]
            for task in islice(processing, max(2, min(SAMPLE, LOOKED_AT // len(self.scheduler.workers))))
            if (held := in_hand.get(task.key)) is not None
        ]
        if not looked_at:
            return
        one = looked_at[0]
        if all(kind is one for kind in looked_at):
            beyond = max(beyond_threads, number - _slots(ws, one.resources, number))
            if beyond > 0:
                stacked[one.group.name] = stacked.get(one.group.name, 0) + beyond
            return
        # By wish, not by name: tasks of different names share a worker's resources.
        piles: dict[tuple[str, frozenset[Any]], int] = {}
        for kind, count in Counter(looked_at).items():
            wish = kind.group.name, frozenset(kind.resources.items())
            piles[wish] = piles.get(wish, 0) + round(count * number / len(looked_at))
        running: list[tuple[int, str]] = []
        for (group, resources), count in piles.items():
            beyond = max(0, count - _slots(ws, dict(resources), count))
            stacked[group] = stacked.get(group, 0) + beyond
            beyond_threads -= beyond
            running.append((count - beyond, group))
        for count, group in sorted(running, reverse=True):
            if beyond_threads <= 0:
                break
            stacked[group] += min(count, beyond_threads)
            beyond_threads -= count


def _slots(ws: Any, resources: Mapping[str, float], most: int) -> int:
    """How many tasks that ask for these a worker's resources are enough for at once; `most` where they are for all."""
    offered = ws.resources
    for name, need in resources.items():
        if need > 0:
            most = min(most, int(offered.get(name, 0) // need))
    return most


def _from_now(coming: Mapping[int, int], now: float) -> dict[int, int]:
    """Numbers by seconds from now, those that are late by how late they are: who asks may not believe them for ever."""
    this = int(now // BUCKET)
    told: dict[int, int] = {}
    for bucket, count in coming.items():
        seconds = min(max(-FARTHEST, (bucket - this) * BUCKET), FARTHEST)
        told[seconds] = told.get(seconds, 0) + count
    return told
