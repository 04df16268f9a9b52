"""The report's picture as a file: ``python -m prefect_htcdask.picture DIRECTORY`` draws it from the numbers there.

In a process of its own, since drawing takes a second or two of computing, which neither the end of a flow run nor the
supervisor's is to wait for. matplotlib is optional (extra `report`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .advice import core_hours, seconds, wasted_core_hours
from .report import COLOURS, FILES, total

LONGEST = 60
"""Seconds that drawing may take; on a host that is so busy nobody misses the picture."""


def why_none(wanted: bool) -> str:
    """Why there will be no picture; empty where there will be one.

    Args:
        wanted: the setting.
    """
    if not wanted:
        return "setting report.picture = False"
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed (pip install 'prefect-htcdask[report]')"
    return ""


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw queued tasks above workers, over time.

    Args:
        report: the summary's `report`.
        path: the PNG file, made with mode 0600.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timeline = report["timeline"]
    steps = len(timeline["queued"])
    unit, per_unit = _unit(steps * timeline["step"])
    edges = [index * timeline["step"] / per_unit for index in range(steps + 1)]
    figure = Figure(figsize=(10, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    above.stairs(_without_gaps(timeline["queued"]), edges, fill=True, color=COLOURS["queued tasks"], alpha=0.8)
    above.set_ylabel("queued tasks")
    floor = [0.0] * steps
    for what in ("running", "idle", "pending"):
        top = [low + high for low, high in zip(floor, _without_gaps(total(timeline, what)), strict=True)]
        below.stairs(top, edges, baseline=floor, fill=True, color=COLOURS[what], alpha=0.85, label=what)
        floor = top
    below.set_ylabel("workers")
    below.set_xlabel(f"time since the cluster was made ({unit})")
    below.legend(loc="upper right", framealpha=0.9)
    for axes in (above, below):
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, edges[-1])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.get_major_locator().set_params(integer=True)
    above.set_title(_words(report), loc="left", fontsize=10)
    descriptor = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        figure.savefig(stream, format="png")


def _unit(length: float) -> tuple[str, float]:
    return next(((unit, per) for unit, per in (("s", 1.0), ("min", 60.0)) if length < 180 * per), ("h", 3600.0))


def _without_gaps(values: Any) -> list[float]:
    return [float("nan") if value is None else float(value) for value in values]


def _words(report: Mapping[str, Any]) -> str:
    used = sum(map(core_hours, report["groups"].values()))
    wasted = sum(map(wasted_core_hours, report["groups"].values()))
    share = f", {100 * wasted / used:.0f} % of them without a task" if used else ""
    tasks = f"{report['tasks']['done']:,} of {report['tasks']['known']:,} tasks"
    return f"{tasks} in {seconds(report['ended'] - report['began'])}; {used:.3g} core-hours{share}"


def main(directory: Path) -> None:
    """Draw the picture of the cluster whose files are in `directory`."""
    signal.alarm(LONGEST)
    os.nice(10)
    _, picture, numbers = FILES
    report = json.loads((directory / numbers).read_text())["report"]
    if report["timeline"]["queued"]:
        draw(report, directory / picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
