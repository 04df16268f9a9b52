"""Which futures are asked for beside the one that somebody waits for."""

from __future__ import annotations

import weakref
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from prefect_htcdask.read_ahead import IN_TURN, SMALL, WINDOW, ReadAhead


class Submitted:
    """As `HTCDaskFuture`, for its part in a row."""

    place: int = 0
    following: weakref.ref[Any] | None = None


def row(count: int) -> tuple[ReadAhead[Submitted], list[Submitted]]:
    reader: ReadAhead[Submitted] = ReadAhead()
    futures = [Submitted() for _ in range(count)]
    # Single submits, and a map.
    for future in futures[: count // 2]:
        reader.follow([future])
    reader.follow(futures[count // 2 :])
    return reader, futures


@given(st.integers(1, 400), st.integers(1, WINDOW))
def test_all_that_are_taken_in_turn_are_asked_for_ahead(count: int, in_hand_at_once: int) -> None:
    """Whatever of what was asked for has come by then is not waited for."""
    reader, futures = row(count)
    asked: set[int] = set()
    waits = number = 0
    while number < count:
        ahead = reader.beside(futures[number], 100)
        waits += 1
        places = [one.place for one in ahead]
        assert all(number + 1 < place <= number + 1 + WINDOW for place in places)
        assert asked.isdisjoint(places), "asked for twice"
        asked.update(places)
        if len(asked) <= IN_TURN or in_hand_at_once == 1:
            number += 1
        else:
            number += min(in_hand_at_once, max(1, max(asked) - number - 1))
    first = futures[IN_TURN].place if count > IN_TURN else count
    assert asked <= set(range(first, count + 1))
    if count > IN_TURN + 1:
        assert max(asked) == count


@given(st.integers(IN_TURN + 2, 100))
def test_large_results_are_left_where_they_are(count: int) -> None:
    reader, futures = row(count)
    assert not any(reader.beside(future, SMALL + 1) for future in futures)


@given(st.permutations(range(40)))
def test_who_takes_them_in_no_order_gets_what_was_asked_for(order: list[int]) -> None:
    reader, futures = row(40)
    in_turn = 0
    before = -1
    for number in order:
        ahead = reader.beside(futures[number], 100)
        in_turn = in_turn + 1 if number > before else 0
        before = number
        if ahead:
            assert in_turn >= IN_TURN


def test_it_ends_at_one_that_nobody_holds_any_more() -> None:
    reader, futures = row(60)
    del futures[30]
    asked = [one.place for future in futures[:20] for one in reader.beside(future, 100)]
    assert asked and max(asked) == 30


def test_one_that_was_never_submitted_here_has_no_place() -> None:
    reader, _ = row(3)
    assert reader.beside(Submitted(), 100) == []
