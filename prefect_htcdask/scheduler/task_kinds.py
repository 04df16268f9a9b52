"""Tasks that are alike: of one name, asking for the same resources, and so of one worker group.

It travels by value to the scheduler (see `demand`): it imports nothing of this package but `groups`, which does too.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from prefect_htcdask.scheduler.worker_groups import group_for

DEFAULT_GROUP = "default"

WINDOW = 100
"""About so many of the last tasks of a name make its mean duration."""

MOST_NAMES = 100
"""Names of tasks, and of resources that no group has, that one answer tells at most."""


class GroupCounts:
    """Tasks that the workers of one group can run, or, beside the groups, those that ask for what no group has.

    Attributes:
        name: the group's name, or what its tasks ask for.
        queued: tasks that are ready and have no worker.
        work: microseconds that the ready tasks and those in hand take, as far as their durations are known.
        unknown: how many of those have names of which none has ended yet.
        coming: waiting tasks all of whose missing inputs are in hand, by the bucket of the time they will be ready.
        finished, total: tasks that ended well, and their microseconds.
        failed, failed_total: tasks that ended with an error, and theirs.
    """

    __slots__ = ("coming", "failed", "failed_total", "finished", "name", "queued", "total", "unknown", "work")

    def __init__(self, name: str) -> None:
        self.name = name
        self.finished = self.total = self.failed = self.failed_total = 0
        self.clear()

    def clear(self) -> None:
        """Forget the tasks that there are, not what ended ones have taught."""
        self.queued = self.work = self.unknown = 0
        self.coming: dict[int, int] = {}


class TaskKind:
    """Tasks of one name that ask for the same resources.

    Attributes:
        group: where they belong.
        resources: what each asks for.
        count: those that are ready or in hand.
        known: whether a duration is known.
        mean: microseconds that one takes on average.
    """

    __slots__ = ("count", "group", "known", "mean", "name", "resources", "samples", "total")

    def __init__(self, name: str, group: GroupCounts, resources: Mapping[str, float]) -> None:
        self.name = name
        self.group = group
        self.resources = resources
        self.known = False
        self.count = self.mean = self.samples = self.total = 0

    def took(self, duration: int) -> None:
        """One took so many microseconds."""
        if self.samples == WINDOW:
            self.total -= self.mean
        else:
            self.samples += 1
        self.total += duration
        mean = self.total // self.samples
        if self.known:
            self.group.work += (mean - self.mean) * self.count
        else:
            self.known = True
            self.group.unknown -= self.count
            self.group.work += mean * self.count
        self.mean = mean


class TaskKinds:
    """The kinds of tasks that a scheduler has had, and the groups that they belong to.

    The kinds are kept as long as this object: there are as many as the scheduler keeps `TaskPrefix` objects, as a rule.

    Args:
        offers: the resources that one worker of each group offers; empty: one group, which all tasks belong to.

    Attributes:
        groups: the groups, in their order.
        unmatched: tasks that no group can run, by what they ask for.
        restricted: kinds that ask for something, by name and wish.
    """

    def __init__(self, offers: Mapping[str, Mapping[str, float]]) -> None:
        self.offers = {name: dict(offer) for name, offer in offers.items()}
        self.groups = {name: GroupCounts(name) for name in self.offers or (DEFAULT_GROUP,)}
        self.unmatched: dict[str, GroupCounts] = {}
        self.restricted: dict[tuple[str, frozenset[Any]], TaskKind] = {}
        self._plain: dict[str, TaskKind] = {}
        self._known: dict[str, TaskKind] = {}

    def clear(self) -> None:
        """Forget the tasks that there are, not what ended ones have taught."""
        for group in (*self.groups.values(), *self.unmatched.values()):
            group.clear()
        for kind in (*self._plain.values(), *self.restricted.values()):
            kind.count = 0

    def kind_of(self, task: Any) -> TaskKind:
        """The kind of a task (`distributed.scheduler.TaskState`)."""
        if task.resource_restrictions or task.worker_restrictions:
            return self._restricted_kind(task)
        try:
            return self._plain[task.group.prefix.name]
        except KeyError:
            self._plain[task.group.prefix.name] = kind = self._new_kind(task, self._group_for({}), {})
            return kind

    def _restricted_kind(self, task: Any) -> TaskKind:
        name: str = task.group.prefix.name
        resources: Mapping[str, float] = task.resource_restrictions or {}
        bound = () if task.loose_restrictions else (task.worker_restrictions or ())
        wish = frozenset((*resources.items(), *bound))
        kind = self.restricted.get((name, wish))
        if kind is None:
            if bound:  # no new worker will have the address that it asks for
                group = self._unmatched(f"worker={min(bound)}")
            else:
                group = self._group_for(resources, loose=task.loose_restrictions)
            self.restricted[name, wish] = kind = self._new_kind(task, group, resources)
        return kind

    def _new_kind(self, task: Any, group: GroupCounts, resources: Mapping[str, float]) -> TaskKind:
        prefix = task.group.prefix
        kind = TaskKind(prefix.name, group, dict(resources))
        # Tasks that ended before this plugin came, or Dask's setting of default durations, have told something.
        if prefix.duration_average > 0:
            kind.took(int(prefix.duration_average * 1e6))
            self._known[kind.name] = kind
        return kind

    def _group_for(self, resources: Mapping[str, float], loose: bool = False) -> GroupCounts:
        if not self.offers:
            return self.groups[DEFAULT_GROUP]
        name = group_for(resources, self.offers)
        if name is None and loose:
            name = group_for(None, self.offers)
        if name is not None:
            return self.groups[name]
        return self._unmatched(", ".join(f"{resource}={resources[resource]:g}" for resource in sorted(resources)))

    def _unmatched(self, wish: str) -> GroupCounts:
        return self.unmatched.setdefault(wish, GroupCounts(wish))

    def learnt(self, kind: TaskKind) -> None:
        """The duration of a kind is known from now on."""
        self._known[kind.name] = kind

    def mean_of_all(self) -> float:
        """Microseconds that a finished task took on average; 0 where none has."""
        finished = total = 0
        for group in self.groups.values():
            finished += group.finished
            total += group.total
        return total / finished if finished else 0.0

    def durations(self) -> dict[str, float]:
        """Mean seconds by task name, for the names that came last."""
        newest = islice(reversed(self._known.items()), MOST_NAMES)
        return {name: kind.mean / 1e6 for name, kind in newest}

    def unserved(self) -> dict[str, int]:
        """Ready tasks by what they ask for, where no group offers it."""
        wanting = ((wish, group.queued) for wish, group in self.unmatched.items() if group.queued)
        return dict(islice(wanting, MOST_NAMES))
