"""The report's text and what it advises: pure, from the numbers that a supervisor leaves."""

from __future__ import annotations

import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_htcdask.supervisor.report.markdown import BLOCKS, COLOURS, MOST_POINTS, _diagram, blocks, markdown, thinned
from prefect_htcdask.supervisor.report.plot import MOST_TICKS, WIDTH, _ticks, svg, why_none
from prefect_htcdask.supervisor.report.recommendations import (
    SMALLEST_REQUEST,
    core_hours,
    efficiency,
    next_size,
    recommend,
    seconds,
    wasted_core_hours,
)

GROUP: dict[str, Any] = {
    "cpus": 1,
    "threads": 1,
    "memory_mib": 2048.0,
    "jobs": 8,
    "started": 8,
    "evictions": 0,
    "holds": 0,
    "worker_seconds": 3600.0,
    "done": 90,
    "task_seconds": 3200.0,
    "wait_median": 12.0,
    "wait_p95": 40.0,
    "boot_median": 4.0,
    "peak_memory_mib": 900.0,
    "peak": 8,
    "pending_seconds": 100,
    "running_seconds": 3300,
    "idle_seconds": 200,
    "settings": "worker",
}


def account(*groups: dict[str, Any], steps: int = 3) -> dict[str, Any]:
    named = {f"g{index}": {**GROUP, **group} for index, group in enumerate(groups or ({},))}
    workers = {name: {what: [1.0] * steps for what in ("pending", "running", "idle")} for name in named}
    return {
        "tasks": {"done": 160, "known": 170},
        "began": 1_795_000_000.0,
        "ended": 1_795_000_750.0,
        "ended_because": "the cluster was closed",
        "groups": named,
        "timeline": {"start": 0.0, "step": 2.0, "queued": [10.0, None, 0.0][:steps] * (steps // 3), "workers": workers},
    }


def summary(*groups: dict[str, Any], steps: int = 3) -> dict[str, Any]:
    return {"jobs": 8, "hosts": ["slot1@a", "slot1@b"], "peak": 8, "report": account(*groups, steps=steps)}


def only(**changes: Any) -> list[str]:
    return recommend(account(changes))


def test_a_run_without_trouble_gets_no_advice() -> None:
    assert only() == []
    assert "Nothing that the numbers tell of" in markdown(summary(), directory="/d")


def test_a_request_far_above_the_peak() -> None:
    (sentence,) = only(peak_memory_mib=310.0)
    assert sentence == "peak memory 310 MiB of 2 GiB requested: `worker.memory` (request_memory) could be 512 MiB"
    assert only(peak_memory_mib=None) == []


def test_a_request_hardly_above_the_peak() -> None:
    (sentence,) = only(peak_memory_mib=2000.0)
    assert "is close" in sentence and sentence.endswith("should rather be 3 GiB")


@given(st.floats(1, 1e6), st.floats(64, 1e6))
def test_advised_memory_is_enough_and_worth_it(peak: float, request: float) -> None:
    for sentence in only(peak_memory_mib=peak, memory_mib=request):
        advised = next_size(1.25 * peak)
        assert advised >= max(1.25 * peak, SMALLEST_REQUEST)
        assert advised * 2 <= request if "could be" in sentence else peak > 0.9 * request


@given(st.floats(0, 1e9))
def test_sizes_are_round_and_close(needed: float) -> None:
    size = next_size(needed)
    assert size >= needed and size <= max(SMALLEST_REQUEST, 1.51 * needed)
    assert any(math.log2(size / part).is_integer() for part in (1, 3))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"holds": 2}, "held 2 times"),
        ({"wait_median": 600.0}, "waited 10 min or longer"),
        ({"jobs": 100, "started": 8}, "92 of 100 worker jobs never started"),
        ({"evictions": 4}, "lost their slots 4 times"),
        ({"boot_median": 90.0}, "takes 1 min 30 s"),
        ({"task_seconds": 900.0, "idle_seconds": 2500, "running_seconds": 1000}, "no task in 71 %"),
        ({"task_seconds": 3600.0, "threads": 4, "cpus": 4}, "25 % of their 4 threads"),
        ({"done": 50_000, "task_seconds": 3300.0}, "0.066 s each on average"),
    ],
)
def test_each_rule_has_its_case(changes: dict[str, Any], words: str) -> None:
    (sentence,) = only(**changes)
    assert words in sentence


def test_of_several_groups_each_is_named() -> None:
    advice = recommend(account({}, {"holds": 1}))
    assert advice == ["**g1**: worker jobs were held once: the table of HTCondor jobs says why, and what to do"]
    text = markdown(summary({}, {"holds": 1}), directory="/d")
    assert "## Worker groups" in text and "| g1 | 8 |" in text
    assert "## Worker groups" not in markdown(summary(), directory="/d")


amounts = st.floats(0, 1e7)


@given(amounts, amounts, st.integers(1, 64), st.integers(1, 64))
def test_what_is_wasted_is_what_no_task_used(worker: float, tasks: float, cpus: int, threads: int) -> None:
    group = {**GROUP, "worker_seconds": worker, "task_seconds": tasks, "cpus": cpus, "threads": threads}
    share, used = efficiency(group), core_hours(group)
    assert share is None or 0 <= share <= 1
    assert 0 <= wasted_core_hours(group) <= used
    if threads == cpus and worker > 0:
        assert wasted_core_hours(group) == pytest.approx(max(0.0, worker * threads - tasks) / 3600, abs=1e-6)


@given(
    st.fixed_dictionaries(
        {
            **{name: st.one_of(st.none(), amounts) for name in ("wait_median", "boot_median", "peak_memory_mib")},
            **{name: st.integers(0, 10_000) for name in ("jobs", "started", "evictions", "holds", "done")},
            **{name: amounts for name in ("worker_seconds", "task_seconds", "idle_seconds", "running_seconds")},
            "threads": st.integers(1, 64),
        }
    )
)
def test_whatever_the_numbers_there_is_a_report(changes: dict[str, Any]) -> None:
    changes["wait_p95"] = changes["wait_median"]
    text = markdown(summary(changes), directory="/d", title="flow / run")
    assert "Core-hours wasted" in text and "nan" not in text and "None" not in text
    assert all(len(sentence) < 300 and sentence.strip() for sentence in only(**changes))


def test_the_report_says_what_was_asked_for() -> None:
    text = markdown(summary(), directory="/runs/c1", title="dimuon / brave-lynx")
    assert text.startswith("# dimuon / brave-lynx\n")
    for words in (
        "for 12 min 30 s. It ended: the cluster was closed",
        "160 ended of 170 known",
        "8 on 2 slots; at most 8 workers",
        "| Core-hours used | 1 |",
        "| Core-hours wasted | 0.111,",
        "| Efficiency | 89 % |",
        "median 12 s, 95 % within 40 s",
        "900 MiB of 2 GiB requested",
        "`/runs/c1` keeps this report",
    ):
        assert words in text
    assert "No picture is beside them: no matplotlib." in markdown(summary(), directory="/d", picture="no matplotlib")
    assert why_none(True) == "" and "report.picture" in why_none(False)


def test_diagrams_have_a_line_for_each_kind_and_no_more_points_than_are_seen() -> None:
    text = markdown(summary(steps=240), directory="/d")
    diagrams = re.findall(r"```mermaid\n(.*?)```", text, re.DOTALL)
    assert [len(re.findall(r"^ +line \[", diagram, re.MULTILINE)) for diagram in diagrams] == [3, 1]
    for line in re.findall(r"line \[(.*)\]", text):
        points = [float(value) for value in line.split(", ")]
        assert 0 < len(points) <= MOST_POINTS
    assert 'x-axis "min" 0 --> 8' in text
    assert re.search(r"\| queued tasks \| red \| `[▁▂▃▄▅▆▇█\u00a0]{30}` \| 10 \|", text), "where nothing draws Mermaid"
    assert "too short for a diagram" in markdown(summary(steps=0), directory="/d")


def test_axes_of_many_tasks_and_long_runs_have_no_exponents() -> None:
    """Mermaid reads none: the diagram would be an error."""
    name = next(iter(COLOURS))
    text = _diagram("queued tasks", {name: [0.0, 123_456.0]}, 10_000 * 3600.0)
    assert 'y-axis "queued tasks" 0 --> 129628.8' in text
    assert 'x-axis "h" 0 --> 20000' in text


@given(st.lists(st.one_of(st.none(), amounts), max_size=500), st.integers(1, 60))
def test_thinning_keeps_the_mean(values: list[float | None], most: int) -> None:
    points, of = thinned(values, most)
    assert len(points) <= most and len(points) == -(-len(values) // of)
    known = [value for value in values if value is not None]
    assert all(min(known) * 0.999 <= point <= max(known) * 1.001 for point in points if point is not None)


@given(st.lists(st.just(0.0) | st.floats(1e-3, 1e7), min_size=1, max_size=30))
def test_blocks_rise_with_their_values(values: list[float]) -> None:
    drawn = blocks(values, max(values))
    assert len(drawn) == len(values)
    heights = [f"\u00a0{BLOCKS}".index(block) for block in drawn]
    for value, height in zip(values, heights, strict=True):
        assert (height > 0) == (value > 0), "what is little is not nothing"
    ordered = [height for _, height in sorted(zip(values, heights, strict=True))]
    assert ordered == sorted(ordered)
    assert max(values) == 0 or max(heights) == len(BLOCKS)


@given(st.floats(0, 1e7))
def test_durations_are_told_to_within_a_tenth(duration: float) -> None:
    units = {"h": 3600, "min": 60, "s": 1}
    words = seconds(duration).split()
    told = sum(float(number) * units[unit] for number, unit in zip(words[::2], words[1::2], strict=True))
    assert told == pytest.approx(duration, rel=0.1, abs=0.06)


SVG = "{http://www.w3.org/2000/svg}"


@given(
    st.lists(st.none() | st.floats(0, 1e6), min_size=1, max_size=240),
    st.floats(0.5, 1e5),
    st.lists(st.none() | st.floats(0, 1e4), min_size=1, max_size=240),
)
def test_the_picture_is_within_its_frame(queued: list[float | None], step: float, workers: list[float | None]) -> None:
    steps = min(len(queued), len(workers))
    numbers = summary()["report"]
    each = {what: workers[:steps] for what in ("pending", "running", "idle")}
    numbers["timeline"] = {"start": 0.0, "step": step, "queued": queued[:steps], "workers": {"default": each}}
    picture = ElementTree.fromstring(svg(numbers))
    assert picture.tag == f"{SVG}svg"
    for path in picture.iter(f"{SVG}path"):
        for number in re.findall(r"[MV]([-\d.]+) ?([-\d.]*)", path.get("d", "")):
            assert all(0 <= float(value) <= WIDTH for value in number if value)
    shown = {title.text for title in picture.iter(f"{SVG}title")}
    assert ("queued tasks" in shown) == any(queued[:steps])
    assert {"running", "idle", "pending"} & shown == ({"running", "idle", "pending"} if any(workers[:steps]) else set())


def test_the_picture_says_what_is_what() -> None:
    text = svg(summary(steps=240)["report"])
    for words in ("160 of 170 tasks in 12 min 30 s; 1 core-hours", ">queued tasks<", ">workers<", ">pending<", "(min)"):
        assert words in text
    assert len(text) < 100_000


@given(st.floats(1e-3, 1e9))
def test_ticks_are_round_and_few(most: float) -> None:
    ticks = _ticks(most)
    assert ticks[0] == 0 and ticks[-1] <= most * (1 + 1e-6) and 3 <= len(ticks) <= MOST_TICKS + 1
    assert _ticks(max(1.0, most), whole=True)[1] >= 1
