"""Sends a flow run's Prefect events: of its cluster, its workers' jobs, and the cleanup after it.

Nothing here waits for the API: Prefect's own thread sends what is queued (`prefect.events.worker.EventsWorker`).
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from prefect.context import FlowRunContext
from prefect.events.utilities import emit_event
from prefect.events.worker import EventsWorker

from prefect_htcdask.supervisor.report.events import (
    CLOSED,
    CREATED,
    EventSpec,
    JobEvents,
    cleanup_event,
    cluster_event,
    flow_run_resource,
    scaled_event,
)
from prefect_htcdask.utils.aio import interpreter_ends

FLUSH_TIMEOUT = 3.0
"""Seconds that the end of a flow run waits at most for events that are still queued."""

logger = logging.getLogger(__name__)


class FlowEvents:
    """The events of one flow run and the cluster that it has.

    Args:
        cluster: name of the cluster.
        context: the flow run's context, in which events are sent: it has the API's address and the flow run.
    """

    def __init__(self, cluster: str, context: contextvars.Context) -> None:
        self._cluster = cluster
        self._context = context
        self._lock = threading.Lock()
        self._jobs = JobEvents(cluster)
        self._emitted = False

    def created(self, dashboard: str, groups: list[str]) -> None:
        """The cluster is there: where its dashboard is, and what worker groups it has."""
        self._send(cluster_event(CREATED, self._cluster, {"dashboard": dashboard, "groups": groups}))

    def closed(self, summary: Mapping[str, Any]) -> None:
        """The cluster is closed, with what its supervisor counted."""
        with self._lock:
            last = self._jobs.due(time.monotonic(), last=True)
        # Of lists, such as the jobs' ids, an event needs the numbers only, which stand beside them.
        told = {name: value for name, value in summary.items() if isinstance(value, (int, float, str))}
        self._send(*last, cluster_event(CLOSED, self._cluster, told))

    def scaled(self, message: Mapping[str, Any]) -> None:
        """The supervisor has changed the number of workers."""
        try:
            self._send(scaled_event(self._cluster, message))
        except (TypeError, ValueError) as exc:
            logger.debug("A decision makes no event: %s", exc)

    def job(self, message: Mapping[str, Any]) -> None:
        """The supervisor has told of a job; events of jobs are sent by `tick`."""
        with self._lock:
            self._jobs.take(message)

    def tick(self) -> None:
        """Send the events of jobs whose time has come; call it about once a second."""
        with self._lock:
            due = self._jobs.due(time.monotonic())
        self._send(*due)

    def _send(self, *events: EventSpec) -> None:
        for event in events:
            try:
                sent = self._context.copy().run(_emit, event)
            except Exception as exc:  # no concern of the flow's
                logger.debug("The event %s could not be sent: %s", event.name, exc)
            else:
                self._emitted = self._emitted or sent

    def flush(self, timeout: float = FLUSH_TIMEOUT) -> bool:
        """Wait until the events are sent, `timeout` seconds at most; returns whether they are."""
        if not self._emitted:
            return True
        # Prefect's own draining would stop the worker under other flow runs of this process; waiting has no deadline.
        waiting = threading.Thread(
            target=self._context.copy().run, args=(_wait_until_sent,), name="htcdask-events", daemon=True
        )
        waiting.start()
        waiting.join(timeout)
        return not waiting.is_alive()


def emit_cleanup(flow_run_id: str, name: str, jobs: int, clusters: list[str], problems: list[str]) -> None:
    """Tell that a hook removed what a flow run had left, or could not remove all; a failure to tell is none."""
    try:
        _emit(cleanup_event(flow_run_id, jobs, clusters, problems, by="hook"), flow_run_resource(flow_run_id, name))
    except Exception as exc:
        logger.debug("The cleanup's event could not be sent: %s", exc)


def _emit(event: EventSpec, *related: dict[str, str]) -> bool:
    """Queue an event; returns whether there is an API that it goes to, and still a way."""
    if interpreter_ends():
        return False
    context = FlowRunContext.get()
    if context is not None and context.flow_run is not None:
        # Said here, since Prefect itself adds only what it can read from the API as it sends.
        related = (*related, flow_run_resource(str(context.flow_run.id), context.flow_run.name))
    return emit_event(event.name, event.resource, related=list(related), payload=event.payload) is not None


def _wait_until_sent() -> None:
    try:
        EventsWorker.instance().wait_until_empty()
    except Exception as exc:
        logger.debug("Events could not be flushed: %s", exc)
