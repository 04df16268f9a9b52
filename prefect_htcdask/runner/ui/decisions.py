"""What the supervisor decides and counts, in words for the flow run's log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def scaling_line(message: Mapping[str, Any]) -> str | None:
    """The line for the log; `None` for a decision that changes no worker.

    Args:
        message: the supervisor's: `text` says why, `submit` and `remove` how many workers come and go.
    """
    changes = [message[name] for name in ("submit", "remove") if name in message]
    if changes and not any(changes):
        return None
    return f"Scaling workers: {message.get('text', '')}"


def summary_line(summary: Mapping[str, Any]) -> str:
    """What the supervisor process counted of a cluster at its end, in words."""
    text = (
        f"{summary['jobs']} HTCondor jobs on {len(summary['hosts'])} slots, "
        f"{summary['worker_hours']:.2f} worker-hours, at most {summary['peak']} workers at once; "
        f"{summary['held']} held, {summary['evicted']} evicted"
    )
    left = summary["left"]
    return f"{text}; {left} still leave the queue" if left else text
