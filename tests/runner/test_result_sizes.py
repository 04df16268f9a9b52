"""How large results are, as an estimate: whatever they are made of, and without running any code of theirs."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import pickle
import threading
import types
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from prefect_htcdask.runner.futures.prefetch import SMALL
from prefect_htcdask.runner.futures.result_sizes import LARGE, ResultSizes, estimated_size


@dataclasses.dataclass
class Holder:
    """Of which Python says that it has 48 bytes."""

    inside: Any


class Model(BaseModel):
    """Likewise."""

    inside: Any


class Slotted:
    """Has no ``__dict__``."""

    __slots__ = ("inside",)
    inside: Any


class Colour(enum.Enum):
    RED = 1


class Dangerous:
    """Whoever looks into it finds out."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"{name} was asked for")

    def __reduce__(self) -> Any:
        raise AssertionError("it was pickled")


class DangerousList(list[Any]):
    """Likewise."""

    def __len__(self) -> int:
        raise AssertionError("its length was asked for")

    def __iter__(self) -> Any:
        raise AssertionError("it was iterated")

    def __sizeof__(self) -> int:
        raise AssertionError("its size was asked for")


class DangerousDict(dict[Any, Any]):
    """Likewise."""

    __len__ = DangerousList.__len__  # type: ignore[assignment]
    __iter__ = DangerousList.__iter__  # type: ignore[assignment]
    __sizeof__ = DangerousList.__sizeof__  # type: ignore[assignment]


simple = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
nested = st.recursive(simple, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner))


@given(nested)
def test_it_is_no_smaller_than_its_pickle(value: Any) -> None:
    size = estimated_size(value)
    assert 2 * size + 100 >= len(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))


class Grown(list[Any]):
    """A list with more."""

    def __init__(self, more: Any) -> None:
        self.more = more


def in_a_slot(value: Any) -> Any:
    made = Slotted()
    made.inside = value
    return made


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        Holder,
        lambda x: Model(inside=x),
        lambda x: {"a": [Holder((x,))]},
        lambda x: types.SimpleNamespace(a=x),
        lambda x: collections.UserDict(a=x),
        lambda x: functools.partial(print, x),
        in_a_slot,
        Grown,
    ],
)
def test_arrays_are_counted_wherever_they_are(wrap: Any) -> None:
    array = np.zeros(1_000_000, dtype=np.uint8)
    assert 1_000_000 <= estimated_size(wrap(array)) < 1_010_000
    assert estimated_size(wrap(np.zeros(10**10, dtype=np.uint8)[: 10**9])) >= 10**9, "no page of it is touched"


@pytest.mark.parametrize(
    "value",
    [
        datetime.datetime.now(),
        decimal.Decimal(1),
        uuid.uuid4(),
        Path("/"),
        Colour.RED,
        np.float64(1),
        np.bool_(True),
        Holder(None),
        Model(inside=3),
        int,
        [1] * 200,
        {"a": 1.0, "b": (2, 3)},
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_small_is_known_to_be(value: Any) -> None:
    assert estimated_size(value) < 10_000


def test_what_cannot_be_looked_into_is_large() -> None:
    deep: Any = []
    for _ in range(10_000):
        deep = [deep]
    in_c = type("Sub", (np.random.Generator,), {})(np.random.PCG64())
    references = np.array([b"x" * 1000] * 10, dtype=object)
    for value in (deep, in_c, Holder(in_c), references):
        assert estimated_size(value) >= LARGE, type(value)
    assert estimated_size(threading.Lock()) < 5_000, "of the standard library"


def test_none_of_its_code_runs() -> None:
    values = [Dangerous(), [Dangerous()], Holder(Dangerous()), DangerousList([1]), DangerousDict(a=1)]
    sizes = [estimated_size(value) for value in values]
    assert max(sizes) < 10_000


def test_many_parts_are_judged_by_the_first_of_them() -> None:
    assert estimated_size([np.zeros(1000, dtype=np.uint8)] * 100_000) >= 100_000_000


def test_a_name_is_large_until_it_was_seen_and_small_again_only_after_a_while() -> None:
    sizes = ResultSizes()
    assert sizes.expected("load") == LARGE
    sizes.saw([("load", 1)] * 2)
    assert sizes.expected("load") == LARGE / 4, "two prove little"
    sizes.saw([("load", 1)] * 6)
    assert sizes.expected("load") <= SMALL and sizes.expected("merge") == LARGE
    sizes.saw([("load", b"x" * 1_000_000), ("load", 2), ("merge", 3)])
    large = sizes.expected("load")
    assert 1_000_000 <= large < 1_001_000
    sizes.saw([("load", 1)])
    assert sizes.expected("load") == large / 4
    for number in range(1000):
        sizes.saw([(f"name {number}", number)])
    assert sizes.expected("load") == LARGE and len(sizes._expected) <= 256, "it does not grow"
