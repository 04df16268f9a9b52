"""The report at the end of a flow run: from the supervisor's summary to Markdown, pure.

The Prefect UI drops pictures that are not at an address. It draws Mermaid diagrams, which its first version does not,
so the picture stands here twice: as Mermaid's, and in the characters of a table, which is its legend too. `picture`
draws a better one for the file beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from prefect_htcdask.supervisor.report.recommendations import (
    core_hours,
    efficiency,
    mib,
    recommend,
    seconds,
    wasted_core_hours,
)

MOST_POINTS = 60
"""Points of each line of a diagram: more are not seen, and Mermaid takes its time for each."""

MOST_BLOCKS = 30
BLOCKS = "▁▂▃▄▅▆▇█"

COLOURS = {"running": "#0072B2", "idle": "#E69F00", "pending": "#999999", "queued tasks": "#CC3311"}
"""Okabe and Ito's, which people with any colour vision tell apart, on white and on black."""

_NAMES = {"#0072B2": "blue", "#E69F00": "orange", "#999999": "grey", "#CC3311": "red"}

FILES = ("report.md", "report.svg", "summary.json")
"""Names of the files beside the workers' logs: this text, the picture, and the numbers."""

Numbers = Sequence[float | None]


def markdown(summary: Mapping[str, Any], *, directory: str, title: str = "", picture: str = "") -> str:
    """The report.

    Args:
        summary: what the supervisor told at its end, with its `report`.
        directory: where the files are.
        title: of the flow run.
        picture: why there is no picture beside it; empty where there is one.
    """
    report = summary["report"]
    parts = [
        f"# {title}" if title else "",
        _first_words(report),
        _numbers(summary, report),
        "## Workers and queued tasks",
        *_diagrams(report["timeline"]),
        "## What to change",
        "\n".join(f"- {sentence}" for sentence in recommend(report)) or "Nothing that the numbers tell of.",
        *_groups(report["groups"]),
        _files(directory, picture or ("" if report["timeline"]["queued"] else "it was too short for one")),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _first_words(report: Mapping[str, Any]) -> str:
    began = datetime.fromtimestamp(report["began"], timezone.utc)
    lasted = seconds(report["ended"] - report["began"])
    why = report["ended_because"]
    return f"From {began:%Y-%m-%d %H:%M:%S} UTC, for {lasted}." + (f" It ended: {why}." if why else "")


def _numbers(summary: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    groups = report["groups"].values()
    used, wasted = sum(map(core_hours, groups)), sum(map(wasted_core_hours, groups))
    tasks = report["tasks"]
    spent = sum(group["task_seconds"] for group in groups)
    rows = [
        ("Tasks", f"{tasks['done']:,} ended of {tasks['known']:,} known; they took {seconds(spent)}"),
        (
            "HTCondor jobs",
            f"{summary['jobs']:,} on {len(summary['hosts']):,} slots; at most {summary['peak']:,} workers at once",
        ),
        ("Core-hours used", f"{used:.3g}"),
        ("Core-hours wasted", f"{wasted:.3g}, those of threads without a task"),
        ("Efficiency", f"{100 * (1 - wasted / used):.0f} %" if used else "no worker ran"),
        ("Queue wait", "; ".join(_each(report["groups"], _wait)) or "no job started"),
        ("Evictions", f"{sum(group['evictions'] for group in groups):,}"),
        ("Held", f"{sum(group['holds'] for group in groups):,}"),
        ("Peak memory", "; ".join(_each(report["groups"], _memory)) or "not told by HTCondor"),
    ]
    return table(("", ""), rows)


def _each(groups: Mapping[str, Mapping[str, Any]], words: Any) -> Iterator[str]:
    for name, group in groups.items():
        if said := words(group):
            yield f"{name}: {said}" if len(groups) > 1 else said


def _wait(group: Mapping[str, Any]) -> str:
    median, most = group["wait_median"], group["wait_p95"]
    return f"median {seconds(median)}, 95 % within {seconds(most)}" if median is not None else ""


def _memory(group: Mapping[str, Any]) -> str:
    peak = group["peak_memory_mib"]
    return f"{mib(peak)} of {mib(group['memory_mib'])} requested" if peak else ""


def _groups(groups: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A table of the worker groups, where there are several."""
    if len(groups) < 2:
        return
    yield "## Worker groups"
    header = ("Group", "Jobs", "At most at once", "Tasks", "Core-hours", "Wasted", "Efficiency")
    yield table(
        header,
        [
            (
                name,
                f"{group['jobs']:,}",
                f"{group['peak']:,}",
                f"{group['done']:,}",
                f"{core_hours(group):.3g}",
                f"{wasted_core_hours(group):.3g}",
                f"{100 * share:.0f} %" if (share := efficiency(group)) is not None else "-",
            )
            for name, group in groups.items()
        ],
    )


def _files(directory: str, picture: str) -> str:
    text, drawn, numbers = FILES
    kept = f"`{directory}` keeps this report ({text}), its numbers ({numbers}) and the workers' logs"
    return f"{kept}. No picture is beside them: {picture}." if picture else f"{kept}; {drawn} is a finer picture."


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


# The diagrams


def total(timeline: Mapping[str, Any], what: str) -> list[float | None]:
    """Workers of all groups that were `pending`, `running` or `idle`, for each step."""
    columns = [workers[what] for workers in timeline["workers"].values()]
    return [None if None in step else sum(step) for step in zip(*columns, strict=True)]


def thinned(values: Numbers, most: int = MOST_POINTS) -> tuple[list[float | None], int]:
    """Means of so many neighbours that there are at most `most`; and of how many."""
    of = -(-len(values) // most) or 1
    parts = [
        [value for value in values[index : index + of] if value is not None] for index in range(0, len(values), of)
    ]
    return [sum(part) / len(part) if part else None for part in parts], of


def _diagrams(timeline: Mapping[str, Any]) -> Iterator[str]:
    lines = {what: total(timeline, what) for what in ("running", "idle", "pending")}
    if len(lines["running"]) < 2:
        yield "It was too short for a diagram."
        return
    yield _legend({**lines, "queued tasks": timeline["queued"]})
    yield _diagram("workers", lines, timeline["step"])
    yield _diagram("queued tasks", {"queued tasks": timeline["queued"]}, timeline["step"])


def _legend(lines: Mapping[str, Numbers]) -> str:
    """Which line is which, for Mermaid draws no legend here, and its course in characters."""
    rows = []
    for what, values in lines.items():
        most = max((value for value in values if value is not None), default=0.0)
        rows.append((what, _NAMES[COLOURS[what]], f"`{blocks(values, most)}`", f"{most:,.0f}"))
    return table(("", "line", "from the beginning to the end", "at most"), rows)


def blocks(values: Numbers, most: float) -> str:
    """The course of some values in characters: the highest block is `most`, a blank is 0 or unknown."""
    points, _ = thinned(values, MOST_BLOCKS)
    heights = [min(len(BLOCKS), math.ceil(len(BLOCKS) * (value or 0.0) / most)) if most > 0 else 0 for value in points]
    # A no-break space: several others would be shown as one.
    return "".join(BLOCKS[height - 1] if height > 0 else "\u00a0" for height in heights)


def _diagram(name: str, lines: Mapping[str, Numbers], step: float) -> str:
    """One diagram."""
    drawn = {what: thinned(values) for what, values in lines.items()}
    points, of = next(iter(drawn.values()))
    length = len(points) * of * step
    unit, per_unit = next(
        ((unit, per) for unit, per in (("s", 1), ("min", 60), ("h", 3600)) if length < 180 * per), ("h", 3600)
    )
    palette = ", ".join(COLOURS[what] for what in drawn)
    top = max((value for values, _ in drawn.values() for value in values if value is not None), default=0.0)
    series = "\n".join(f"    line [{', '.join(_number(value) for value in values)}]" for values, _ in drawn.values())
    return (
        "```mermaid\n"
        f'%%{{init: {{"xyChart": {{"width": 900, "height": 300}}, '
        f'"themeVariables": {{"xyChart": {{"plotColorPalette": "{palette}"}}}}}}}}%%\n'
        "xychart-beta\n"
        f'    x-axis "{unit}" 0 --> {_number(length / per_unit)}\n'
        f'    y-axis "{name}" 0 --> {_number(max(1.0, 1.05 * top))}\n'
        f"{series}\n"
        "```"
    )


def _number(value: float | None) -> str:
    # Mermaid has no gaps, and no exponents.
    return f"{value or 0.0:.2f}".rstrip("0").rstrip(".")
