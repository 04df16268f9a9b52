"""What the supervisor decides, as the flow run's reader sees it: a line in its log, and a Prefect event.

Automations can match the event: name `EVENT`, resource ``htcdask.worker-group.CLUSTER.GROUP``, related to the flow run.
"""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Mapping
from typing import Any

from prefect.context import FlowRunContext
from prefect.events.utilities import emit_event
from prefect.events.worker import EventsWorker

EVENT = "htcdask.workers.scaled"
FLUSH_TIMEOUT = 3.0
"""Seconds that the end of a flow run waits at most for events that are still queued."""

logger = logging.getLogger(__name__)


class Decisions:
    """Passes on the decisions of one flow run's supervisor.

    Args:
        cluster: name of the cluster whose workers they are about.
        context: the flow run's context, in which events are sent: it has the API's address and the flow run.
    """

    def __init__(self, cluster: str, context: contextvars.Context) -> None:
        self._cluster = cluster
        self._context = context
        self._emitted = False

    def line(self, message: Mapping[str, Any]) -> str | None:
        """The line for the log; `None` for a decision that changes no worker.

        Args:
            message: the supervisor's: `text` says why, `submit` and `remove` how many workers come and go.
        """
        changes = [message[name] for name in ("submit", "remove") if name in message]
        if changes and not any(changes):
            return None
        return f"Scaling workers: {message.get('text', '')}"

    def emit(self, message: Mapping[str, Any]) -> None:
        """Queue the event; an API that does not answer is no concern of the flow's."""
        try:
            self._context.copy().run(self._emit, message)
        except Exception as exc:
            logger.debug("A scaling event could not be sent: %s", exc)

    def _emit(self, message: Mapping[str, Any]) -> None:
        group = str(message.get("group", "default"))
        context = FlowRunContext.get()
        related = []
        if context is not None and context.flow_run is not None:
            # Said here, since Prefect itself adds only what it can read from the API as it sends.
            related.append(
                {
                    "prefect.resource.id": f"prefect.flow-run.{context.flow_run.id}",
                    "prefect.resource.role": "flow-run",
                    "prefect.resource.name": context.flow_run.name,
                }
            )
        event = emit_event(
            EVENT,
            resource={
                "prefect.resource.id": f"htcdask.worker-group.{self._cluster}.{group}",
                "prefect.resource.name": group,
                "htcdask.cluster": self._cluster,
            },
            related=related,
            payload={
                "group": group,
                **{
                    name: int(message[name]) for name in ("target", "submit", "remove") if message.get(name) is not None
                },
                "reason": str(message.get("text", "")),
            },
        )
        self._emitted = self._emitted or event is not None

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


def _wait_until_sent() -> None:
    try:
        EventsWorker.instance().wait_until_empty()
    except Exception as exc:
        logger.debug("Scaling events could not be flushed: %s", exc)


def summary_line(summary: Mapping[str, Any]) -> str:
    """What the supervisor process counted of a cluster at its end, in words."""
    text = (
        f"{summary['jobs']} HTCondor jobs on {len(summary['hosts'])} slots, "
        f"{summary['worker_hours']:.2f} worker-hours, at most {summary['peak']} workers at once; "
        f"{summary['held']} held, {summary['evicted']} evicted"
    )
    left = summary["left"]
    return f"{text}; {left} still leave the queue" if left else text
