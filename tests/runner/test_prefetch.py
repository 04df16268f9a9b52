"""Which futures are asked for beside the one that somebody waits for."""

from __future__ import annotations

import weakref
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from prefect_htcdask.runner.futures.prefetch import IN_TURN, SMALL, WINDOW, Prefetcher


class Submitted:
    """As `PendingResult`, for its part in a row."""

    task_name: str = "load"
    place: int = 0
    following: weakref.ref[Any] | None = None


def row(count: int) -> tuple[Prefetcher[Submitted], list[Submitted]]:
    reader: Prefetcher[Submitted] = Prefetcher()
    futures = [Submitted() for _ in range(count)]
    # Single submits, and a map.
    for future in futures[: count // 2]:
        reader.follow([future])
    reader.follow(futures[count // 2 :])
    return reader, futures


def ahead_of(reader: Prefetcher[Submitted], future: Submitted, size: float = 100) -> list[Submitted]:
    """As a collector asks."""
    return reader.beside(future, size) if reader.take(future) else []


@given(st.integers(1, 400), st.integers(1, WINDOW))
def test_all_that_are_taken_in_turn_are_asked_for_ahead(count: int, in_hand_at_once: int) -> None:
    """Whatever of what was asked for has come by then is not waited for."""
    reader, futures = row(count)
    asked: set[int] = set()
    number = 0
    while number < count:
        place = number + 1
        ahead = [one.place for one in ahead_of(reader, futures[number])]
        assert all(place < one <= place + min(WINDOW, place) for one in ahead)
        assert asked.isdisjoint(ahead), "asked for twice"
        asked.update(ahead)
        coming = max(asked, default=place) - place
        number += 1 if in_hand_at_once == 1 else max(1, min(in_hand_at_once, coming))
    assert asked <= set(range(IN_TURN + 1, count + 1))
    if count > IN_TURN:
        assert asked == set(range(IN_TURN + 1, count + 1))


@given(st.integers(IN_TURN + 2, 100))
def test_large_results_are_left_where_they_are(count: int) -> None:
    reader, futures = row(count)
    assert not any(ahead_of(reader, future, SMALL + 1) for future in futures)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=30))
def test_a_gap_begins_anew(runs: list[int]) -> None:
    """Runs of futures that are taken in turn, with one left out between them."""
    reader, futures = row(sum(runs) + len(runs))
    number = in_turn = until = 0
    for run in runs:
        for nth in range(run):
            # What was left out may have been asked for ahead, and come by itself.
            in_turn = in_turn + 1 if nth else in_turn + 2 if number <= until else 1
            ahead = ahead_of(reader, futures[number])
            number += 1
            if ahead:
                assert in_turn >= IN_TURN
                until = ahead[-1].place
        number += 1


def test_another_task_s_results_are_not_asked_for() -> None:
    reader, futures = row(60)
    for future in futures[30:]:
        future.task_name = "merge"
    asked = [one.place for future in futures[:30] for one in ahead_of(reader, future)]
    assert asked and max(asked) == 30


def test_it_ends_at_one_that_nobody_holds_any_more() -> None:
    reader, futures = row(60)
    del futures[30]
    asked = [one.place for future in futures[:20] for one in ahead_of(reader, future)]
    assert asked and max(asked) == 30


def test_one_that_was_never_submitted_here_has_no_place() -> None:
    reader, _ = row(3)
    assert not reader.take(Submitted())
