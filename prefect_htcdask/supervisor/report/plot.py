"""The report's picture as a file: queued tasks above workers, over time, as SVG. Pure, and a matter of milliseconds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from prefect_htcdask.supervisor.report.markdown import COLOURS, total
from prefect_htcdask.supervisor.report.recommendations import core_hours, seconds, wasted_core_hours

WIDTH, HEIGHT = 900, 560
LEFT, RIGHT = 60, 880
PANELS = {"queued tasks": (40, 210), "workers": (240, 500)}
"""Top and bottom of each diagram, in the picture's units."""

MOST_TICKS = 6


def why_none(wanted: bool) -> str:
    """Why there will be no picture; empty where there will be one.

    Args:
        wanted: the setting.
    """
    return "" if wanted else "setting report.picture = False"


def svg(report: Mapping[str, Any]) -> str:
    """Draw queued tasks above workers, over time.

    Args:
        report: the summary's `report`, with one step of its timeline at least.
    """
    timeline = report["timeline"]
    length = len(timeline["queued"]) * timeline["step"]
    layers = {what: total(timeline, what) for what in ("running", "idle", "pending")}
    floor = [0.0] * len(timeline["queued"])
    areas = []
    for what, values in layers.items():
        top = [None if value is None else low + value for low, value in zip(floor, values, strict=True)]
        areas.append((what, floor, top))
        floor = [low if value is None else value for low, value in zip(floor, top, strict=True)]
    queued: list[tuple[str, list[float], Sequence[float | None]]] = [
        ("queued tasks", [0.0] * len(floor), timeline["queued"])
    ]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12" fill="#333">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="22">{escape(_words(report))}</text>',
        *_panel("queued tasks", queued, length),
        *_panel("workers", areas, length),
        *_legend(list(layers)),
        *_time_axis(length),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _panel(
    name: str, areas: Sequence[tuple[str, Sequence[float], Sequence[float | None]]], length: float
) -> Iterator[str]:
    upper, lower = PANELS[name]
    most = max((value for _, _, top in areas for value in top if value is not None), default=0.0)
    ticks = _ticks(max(1.0, most), whole=True)
    highest = max(ticks[-1], most)

    def y(value: float) -> float:
        return lower - (lower - upper) * value / highest

    for tick in ticks:
        yield f'<path d="M{LEFT} {y(tick):.1f}H{RIGHT}" stroke="#ddd"/>'
        yield f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:,g}</text>'
    for what, floor, top in areas:
        if path := " ".join(_steps(floor, top, y)):
            yield f'<path d="{path}" fill="{COLOURS[what]}" fill-opacity="0.85"><title>{what}</title></path>'
    middle = (upper + lower) / 2
    yield f'<text x="16" y="{middle}" transform="rotate(-90 16 {middle})" text-anchor="middle">{name}</text>'
    yield f'<path d="M{LEFT} {upper}V{lower}H{RIGHT}" fill="none" stroke="#333"/>'


def _steps(floor: Sequence[float], top: Sequence[float | None], y: Any) -> Iterator[str]:
    """A box for each step of which anything is known."""
    width = (RIGHT - LEFT) / len(top)
    for index, (low, high) in enumerate(zip(floor, top, strict=True)):
        if high is not None and high > low:
            # They overlap by a hair, or the seams would show.
            yield f"M{LEFT + index * width:.2f} {y(low):.1f}V{y(high):.1f}h{width + 0.3:.2f}V{y(low):.1f}z"


def _legend(names: Sequence[str]) -> Iterator[str]:
    _, lower = PANELS["queued tasks"]
    for index, name in enumerate(names):
        x = RIGHT - 90 * (len(names) - index)
        yield f'<rect x="{x}" y="{lower + 9}" width="12" height="12" fill="{COLOURS[name]}" fill-opacity="0.85"/>'
        yield f'<text x="{x + 17}" y="{lower + 20}">{name}</text>'


def _time_axis(length: float) -> Iterator[str]:
    units = (("s", 1.0), ("min", 60.0), ("h", 3600.0))
    unit, per_unit = next((one for one in units if length < 180 * one[1]), units[-1])
    _, lower = PANELS["workers"]
    for tick in _ticks(length / per_unit):
        x = LEFT + (RIGHT - LEFT) * tick * per_unit / length
        yield f'<path d="M{x:.1f} {lower}v5" stroke="#333"/>'
        yield f'<text x="{x:.1f}" y="{lower + 20}" text-anchor="middle">{tick:g}</text>'
    middle = (LEFT + RIGHT) / 2
    yield f'<text x="{middle}" y="{lower + 42}" text-anchor="middle">time since the cluster was made ({unit})</text>'


def _ticks(most: float, whole: bool = False) -> list[float]:
    """Round numbers from 0 to `most`, `MOST_TICKS` apart from 0 at most."""
    power = 10.0 ** math.floor(math.log10(most / MOST_TICKS))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power * MOST_TICKS >= most)
    step = max(1.0, round(step)) if whole else step
    return [round(index * step, 10) for index in range(int(most / step * (1 + 1e-9)) + 1)]


def _words(report: Mapping[str, Any]) -> str:
    used = sum(map(core_hours, report["groups"].values()))
    wasted = sum(map(wasted_core_hours, report["groups"].values()))
    share = f", {100 * wasted / used:.0f} % of them without a task" if used else ""
    tasks = f"{report['tasks']['done']:,} of {report['tasks']['known']:,} tasks"
    return f"{tasks} in {seconds(report['ended'] - report['began'])}; {used:.3g} core-hours{share}"
