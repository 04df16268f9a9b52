"""What the artifacts of a flow run say, from what its supervisor tells. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, NamedTuple

from prefect_htcdask.supervisor.report.recommendations import mib


class Content(NamedTuple):
    """What an artifact says.

    Attributes:
        type: as Prefect names it; a link is Markdown there.
        data: its contents.
        description: shown above it, Markdown.
    """

    type: str
    data: Any
    description: str


def dashboard_link(address: str) -> Content:
    """The Dask dashboard, while its scheduler lives."""
    return Content(
        "markdown",
        f"[{address}]({address})",
        "The Dask dashboard of this flow run, as long as it runs",
    )


def dashboard_over() -> Content:
    """What takes the link's place afterwards."""
    return Content(
        "markdown",
        "The flow run is over, and its Dask scheduler with the dashboard is gone. What it did is in the report.",
        "The Dask dashboard of this flow run",
    )


def progress(message: Mapping[str, Any], over: bool = False) -> Content:
    """Tasks done of those known, and who works on them.

    Args:
        message: the supervisor's `progress`, or its last account.
        over: whether the cluster is no more.
    """
    done, known = message["tasks"]["done"], message["tasks"]["known"]
    workers = {
        what: sum(group[what] for group in message["workers"].values()) for what in ("running", "idle", "pending")
    }
    words = f"{done:,} of {known:,} tasks known to the Dask scheduler have ended"
    if not over:
        words += (
            f"; {message['queued']:,} queued; workers: {workers['running']:,} with a task, {workers['idle']:,} "
            f"without, {workers['pending']:,} pending"
        )
    return Content("progress", round(100 * done / known, 1) if known else 0.0, words)


def jobs(message: Mapping[str, Any]) -> Content | None:
    """The table of HTCondor jobs; `None` before there are any."""
    total = sum(message["states"].values())
    if not total:
        return None
    rows = [_row(job) for job in message["jobs"]]
    states = ", ".join(f"{count:,} {state}" for state, count in sorted(message["states"].items()))
    words = f"{total:,} HTCondor job{'s'[: total > 1]}: {states}."
    if more := total - len(rows):
        words += f" The {len(rows):,} most telling are shown, those with a problem first; {more:,} more "
        words += f"{'is' if more == 1 else 'are'} not (setting `report.rows`)."
    return Content("table", json.dumps(rows), words)


def report(text: str) -> Content:
    """The report at the end."""
    return Content("markdown", text, "What the HTCondor workers of this flow run did and cost, and what to change")


def _row(job: Mapping[str, Any]) -> dict[str, Any]:
    peak, request = job["memory_mib"], job["request_mib"]
    return {
        "job": job["id"],
        "state": job["state"],
        "host": job["host"] or "",
        "start (UTC)": _time(job["start"]),
        "end (UTC)": _time(job["end"]),
        "core-hours": f"{job['core_hours']:.3g}",
        "peak memory": f"{mib(peak)} of {mib(request)}" if peak else f"? of {mib(request)}",
        # The longest is the last: what the page is too narrow for is scrolled to.
        "hold reason, or how it ended": job["reason"],
    }


def _time(when: float | None) -> str:
    return f"{datetime.fromtimestamp(when, timezone.utc):%m-%d %H:%M:%S}" if when else ""
