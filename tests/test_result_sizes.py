"""How large results are: whatever they are made of, and without a copy of them."""

from __future__ import annotations

import dataclasses
import pickle
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_htcdask.result_sizes import LARGE, ResultSizes, pickled_size


@dataclasses.dataclass
class Holder:
    """Of which Python says that it has 48 bytes."""

    inside: Any


simple = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()


@given(st.recursive(simple, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner)))
def test_it_is_about_as_large_as_its_pickle(value: Any) -> None:
    size, pickled = pickled_size(value), len(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))
    assert size <= 4 * pickled and pickled <= 4 * size + 100


@pytest.mark.parametrize("wrapped", [False, True])
def test_arrays_are_counted_wherever_they_are(wrapped: bool) -> None:
    array = np.zeros(1_000_000, dtype=np.uint8)
    value = Holder([array]) if wrapped else array
    assert 1_000_000 <= pickled_size(value) < 1_010_000
    assert pickled_size(Holder(np.zeros(10**10, dtype=np.uint8)[: 10**9])) == LARGE, "a GB, and no page of it touched"


def test_what_cannot_be_pickled_is_large() -> None:
    assert pickled_size(threading.Lock()) == LARGE
    assert pickled_size([lambda: 1]) < 5000, "as Dask would, by value"


def test_a_name_is_large_until_it_was_seen_and_small_again_only_after_a_while() -> None:
    sizes = ResultSizes()
    assert sizes.expected("load") == LARGE
    sizes.saw("load", [1, 2, 3])
    assert sizes.expected("load") < 100 and sizes.expected("merge") == LARGE
    sizes.saw("load", [b"x" * 1_000_000, 2, 3])
    assert sizes.expected("load") == 1_000_000
    sizes.saw("load", [1])
    assert sizes.expected("load") == 250_000
    for number in range(1000):
        sizes.saw(f"name {number}", [number])
    assert sizes.expected("load") == LARGE and len(sizes._expected) <= 256, "it does not grow"
