"""The timeline: nothing that was seen is lost as its resolution halves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_htcdask.supervisor.report.timeline import LONGEST_HOLD, Timeline, Workers

sightings = st.lists(
    st.tuples(
        st.floats(min_value=-5.0, max_value=150.0),
        st.integers(min_value=0, max_value=10_000),
        st.tuples(*3 * [st.integers(min_value=0, max_value=5_000)]),
    ),
    max_size=60,
)


@given(sightings, st.sampled_from([2, 4, 10]))
def test_halving_keeps_the_time_and_what_was_seen_in_it(
    seen: list[tuple[float, int, tuple[int, ...]]], most: int
) -> None:
    timeline = Timeline(["cpu"], start=1000.0, most=most)
    now, known = 1000.0, 0.0
    expected = [0.0] * 4
    last: list[int] | None = None
    for pause, queued, workers in seen:
        held = min(max(0.0, pause), LONGEST_HOLD) if last is not None else 0.0
        known += held
        expected = [total + held * value for total, value in zip(expected, last or [0] * 4, strict=True)]
        last = [queued, *workers]
        now = max(now, now + pause)
        timeline.saw(now if pause >= 0 else now + pause, queued, {"cpu": Workers(*workers)})
    told = timeline.told()
    assert len(told["queued"]) <= most
    assert told["step"] == 1.0 or told["step"] * most < 2 * max(2.0, now - 1000.0)
    assert math.isclose(sum(timeline._known), known, abs_tol=1e-6)
    sums = [sum(column) for column in zip(*timeline._sums, strict=True)] or [0.0] * 4
    assert sums == pytest.approx(expected, rel=1e-6, abs=1e-3)
    assert timeline.seconds()["cpu"] == tuple(round(value) for value in sums[1:])


def test_a_step_is_the_mean_of_its_time() -> None:
    timeline = Timeline(["cpu", "gpu"], start=0.0, step=2.0)
    timeline.saw(0.0, 10, {"cpu": Workers(pending=4), "gpu": Workers(idle=1)})
    timeline.saw(1.5, 2, {"cpu": Workers(running=4)})
    timeline.until(4.0)
    told = timeline.told()
    assert told["queued"] == [8.0, 2.0]
    assert told["workers"]["cpu"] == {"pending": [3.0, 0.0], "running": [1.0, 4.0], "idle": [0.0, 0.0]}
    assert told["workers"]["gpu"]["idle"] == [0.75, 0.0]
    assert timeline.seconds() == {"cpu": Workers(6, 10, 0), "gpu": Workers(0, 0, 2)}


def test_of_the_time_in_which_a_host_slept_nothing_is_known() -> None:
    timeline = Timeline(["cpu"], start=0.0, step=10.0)
    timeline.saw(0.0, 3, {})
    timeline.saw(1000.0, 5, {})
    timeline.until(1010.0)
    queued = timeline.told()["queued"]
    assert queued[:6] == [3.0] * 6 and queued[-1] == 5.0 and set(queued[6:-1]) == {None}


def test_nothing_seen_is_nothing_told() -> None:
    told = Timeline(["cpu"], start=1.0).told()
    assert (told["queued"], told["workers"]["cpu"]["idle"]) == ([], [])
    assert Timeline(["cpu"], start=1.0).seconds() == {"cpu": Workers()}
