"""What Prefect events of this package look like: names, resources, payloads, and how many there are of jobs.

Pure. A trigger of an automation sees an event's name and the labels of its resources, not its payload: so the diagnosis
category is a label too.

- ``htcdask.cluster.created``, ``htcdask.cluster.closed``: a flow run got its cluster, or gave it up. The resource is
  ``htcdask.cluster.NAME``.
- ``htcdask.cluster.scaled``: the number of a group's workers was changed. ``htcdask.worker-group.NAME.GROUP``.
- ``htcdask.job.started``, ``….held``, ``….evicted``, ``….removed``, ``….exited``: HTCondor said so of one or more jobs
  of a group. ``htcdask.worker-group.NAME.GROUP``, with the label ``htcdask.category`` where something is wrong.
- ``htcdask.cleanup.succeeded``, ``htcdask.cleanup.failed``: what a flow run had left was removed from outside of its
  process, or could not be. ``htcdask.flow-run.ID``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CREATED = "htcdask.cluster.created"
SCALED = "htcdask.cluster.scaled"
CLOSED = "htcdask.cluster.closed"
CLEANUP_SUCCEEDED = "htcdask.cleanup.succeeded"
CLEANUP_FAILED = "htcdask.cleanup.failed"

_JOB_EVENTS = frozenset({"started", "held", "evicted", "removed", "exited"})
_NAMED_JOBS = 20
"""Jobs, and hosts, that one event names at most."""

_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 60.0
"""Seconds between two events that differ in nothing but their jobs: at first, and where they go on for long."""


@dataclass(frozen=True)
class EventSpec:
    """An event, but for the flow run that it is related to."""

    name: str
    resource: dict[str, str]
    payload: dict[str, Any]


def cluster_event(name: str, cluster: str, payload: Mapping[str, Any]) -> EventSpec:
    """An event of a whole cluster."""
    resource = {
        "prefect.resource.id": f"htcdask.cluster.{cluster}",
        "prefect.resource.name": cluster,
        "htcdask.cluster": cluster,
    }
    return EventSpec(name, resource, dict(payload))


def scaled_event(cluster: str, message: Mapping[str, Any]) -> EventSpec:
    """From the supervisor's message of a decision."""
    group = str(message.get("group", "default"))
    numbers = {name: int(message[name]) for name in ("target", "submit", "remove") if message.get(name) is not None}
    payload = {"group": group, **numbers, "reason": str(message.get("text", ""))}
    return EventSpec(SCALED, _group_resource(cluster, group), payload)


def cleanup_event(flow_run_id: str, jobs: int, clusters: list[str], problems: list[str], by: str) -> EventSpec:
    """That what a flow run had left behind was removed, or not all of it.

    Args:
        flow_run_id: the flow run.
        jobs: how many jobs were removed.
        clusters: names of the gateway clusters that were stopped.
        problems: what was in the way; none where all is well.
        by: who did it: ``hook`` or ``supervisor``.
    """
    return EventSpec(
        CLEANUP_FAILED if problems else CLEANUP_SUCCEEDED,
        {"prefect.resource.id": f"htcdask.flow-run.{flow_run_id}", "htcdask.by": by},
        {"jobs": jobs, "clusters": clusters, "problems": problems, "by": by},
    )


def flow_run_resource(flow_run_id: str, name: str) -> dict[str, str]:
    """The flow run, as a related resource."""
    return {
        "prefect.resource.id": f"prefect.flow-run.{flow_run_id}",
        "prefect.resource.role": "flow-run",
        "prefect.resource.name": name,
    }


def _group_resource(cluster: str, group: str, category: str | None = None) -> dict[str, str]:
    resource = {
        "prefect.resource.id": f"htcdask.worker-group.{cluster}.{group}",
        "prefect.resource.name": group,
        "htcdask.cluster": cluster,
        "htcdask.group": group,
    }
    return {**resource, "htcdask.category": category} if category else resource


@dataclass
class _Batch:
    """Jobs of which the same is to be told, and when it may be told next (monotonic seconds)."""

    messages: list[Mapping[str, Any]] = field(default_factory=list)
    count: int = 0
    not_before: float = 0.0
    pause: float = _FIRST_PAUSE


class JobEvents:
    """Makes events of the supervisor's messages on jobs: one for all jobs that share an outcome at a time.

    Thousands of workers may start within a minute: the first event of a kind comes at once, later ones ever more
    seldom, each with the number of its jobs. None is left out of the count.

    Args:
        cluster: name of the cluster.
    """

    def __init__(self, cluster: str) -> None:
        self._cluster = cluster
        self._batches: OrderedDict[tuple[str, str, str], _Batch] = OrderedDict()

    def take(self, message: Mapping[str, Any]) -> None:
        """Take a message of the kind ``job`` (`supervisor.job_message`)."""
        what = str(message.get("what"))
        if what not in _JOB_EVENTS or (what == "evicted" and message.get("asked_for")):
            return
        key = what, str(message.get("group") or "default"), str(message.get("category") or "")
        batch = self._batches.setdefault(key, _Batch())
        batch.count += 1
        if len(batch.messages) < _NAMED_JOBS:
            batch.messages.append(message)

    def due(self, now: float, last: bool = False) -> list[EventSpec]:
        """The events whose time has come.

        Args:
            now: monotonic seconds.
            last: whether none is held back, since the flow run is about to end.
        """
        events = []
        for key, batch in self._batches.items():
            if batch.count and (last or now >= batch.not_before):
                events.append(self._event(key, batch))
                # Where there was a pause long enough, what comes next is news again.
                quiet = now - batch.not_before > _LONGEST_PAUSE
                batch.pause = _FIRST_PAUSE if quiet else min(2 * batch.pause, _LONGEST_PAUSE)
                batch.messages, batch.count, batch.not_before = [], 0, now + batch.pause
        return events

    def _event(self, key: tuple[str, str, str], batch: _Batch) -> EventSpec:
        what, group, category = key
        first = batch.messages[0]
        payload = {
            "group": group,
            "count": batch.count,
            "jobs": [str(message.get("job_id")) for message in batch.messages],
            "hosts": sorted({str(message["host"]) for message in batch.messages if message.get("host")}),
            "category": category or None,
            "summary": str(first.get("summary") or ""),
            "remedy": str(first.get("remedy") or ""),
        }
        return EventSpec(f"htcdask.job.{what}", _group_resource(self._cluster, group, category), payload)
