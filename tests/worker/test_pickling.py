"""Exceptions and results that pickle does not bring home by itself."""

from __future__ import annotations

import pickle
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from distributed.protocol import deserialize, serialize
from hypothesis import given
from hypothesis import strategies as st
from prefect._internal.result_records import ResultRecord, ResultRecordMetadata
from prefect.states import Completed, Failed

from prefect_htcdask.errors import HTCDaskError, RemoteTaskError, UnpicklableResultError
from prefect_htcdask.runner.futures.compact_state import CompactState
from prefect_htcdask.worker.pickling import (
    MOST_EXCEPTIONS,
    MOST_FRAMES,
    dump_exception,
    load_exception,
    why_unpicklable,
)
from prefect_htcdask.worker.portable_states import is_unreadable, portable


class TwoArguments(Exception):
    def __init__(self, code: int, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code


class AddsToItsMessage(Exception):
    """Its pickle can be read, and says something else: "code code 3"."""

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")


class HoldsLock(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text, threading.Lock())
        self.text = text
        self.lock = threading.Lock()

    def __str__(self) -> str:
        assert self.lock
        return self.text


class KeywordsOnly(OSError):
    def __init__(self, *, path: str) -> None:
        super().__init__(2, "no such event", path)
        self.path = path


class BrokenReduce(Exception):
    def __reduce__(self) -> Any:
        return BrokenReduce.from_nothing, ()

    @staticmethod
    def from_nothing() -> None:
        raise RuntimeError("it refuses")


class BrokenStr(Exception):
    def __str__(self) -> str:
        raise RuntimeError("it has no words")


class BadUnpickle:
    def __reduce__(self) -> Any:
        return _refuse, ()


def _refuse() -> None:
    raise RuntimeError("this value refuses to be unpickled")


ODD: list[Callable[[], BaseException]] = [
    lambda: ValueError("plain"),
    lambda: TwoArguments(404, "no such dataset"),
    lambda: AddsToItsMessage(3),
    lambda: HoldsLock("the detector is locked"),
    lambda: KeywordsOnly(path="run1.root"),
    lambda: BrokenReduce("it happened"),
    lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    lambda: KeyError("k"),
    lambda: SystemExit(3),
    lambda: StopIteration(7),
    lambda: SyntaxError("bad", ("f.py", 1, 2, "x =")),
    lambda: KeyError(object()),
]


def raised(exc: BaseException, cause: BaseException | None = None, context: BaseException | None = None) -> Any:
    """The exception as it is caught, with a traceback."""
    exc.__context__ = context
    try:
        raise exc from cause
    except BaseException as caught:
        caught.__suppress_context__ = cause is not None
        return caught


KNOWN = {type(make()) for make in ODD}


def chain_of(exc: BaseException | None) -> list[tuple[type, str]]:
    """Class and message of an exception and of those that it comes from."""
    found: list[tuple[type, str]] = []
    while exc is not None:
        # A class of the same name stands for one whose message cannot be had otherwise.
        cls = next(cls for cls in type(exc).__mro__ if cls in KNOWN)
        found.append((cls, "" if "0x" in str(exc) else str(exc)))
        exc = exc.__cause__ or exc.__context__
    return found


@pytest.mark.parametrize("make", ODD)
def test_an_exception_arrives_with_class_message_and_traceback(make: Callable[[], BaseException]) -> None:
    exc = raised(make())
    came = load_exception(dump_exception(exc))
    assert isinstance(came, type(exc))
    assert "0x" in str(exc) or str(came) == str(exc)
    text = "".join(traceback.format_exception(came))
    assert "in raised" in text and "raise exc from cause" in text and type(exc).__name__ in text


@given(st.lists(st.sampled_from(ODD), min_size=1, max_size=5), st.booleans())
def test_so_do_those_that_it_comes_from(makers: list[Callable[[], BaseException]], by_cause: bool) -> None:
    exc: BaseException | None = None
    for make in makers:
        exc = raised(make(), cause=exc) if by_cause else raised(make(), context=exc)
    assert exc is not None
    came = load_exception(dump_exception(exc))
    assert chain_of(came) == chain_of(exc)


def test_what_can_be_pickled_of_an_exception_is_kept() -> None:
    exc = HoldsLock("the detector is locked")
    exc.run = 7  # type: ignore[attr-defined]
    came = load_exception(dump_exception(exc))
    assert (came.run, came.text, str(came)) == (7, "the detector is locked", "the detector is locked")  # type: ignore[attr-defined]
    assert load_exception(dump_exception(TwoArguments(404, "gone"))).code == 404  # type: ignore[attr-defined]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="groups and notes came with Python 3.11")
def test_groups_and_notes() -> None:
    class OwnGroup(ExceptionGroup[Exception]):  # type: ignore[name-defined]  # noqa: F821
        pass

    for cls in (ExceptionGroup, OwnGroup):  # type: ignore[name-defined]  # noqa: F821
        group = raised(cls("several", [raised(TwoArguments(1, "one")), cls("inner", [HoldsLock("locked")])]))
        group.add_note("beside the point")
        came = load_exception(dump_exception(group))
        assert type(came).__name__ == cls.__name__ and str(came) == str(group)
        assert came.__notes__ == ["beside the point"]
        one, inner = came.exceptions
        assert isinstance(one, TwoArguments) and str(one) == "1: one" and one.__traceback__ is not None
        assert isinstance(inner.exceptions[0], HoldsLock) and str(inner.exceptions[0]) == "locked"


def test_an_endless_chain_and_a_deep_traceback_arrive_shortened() -> None:
    def deep() -> None:
        deep()

    exc: BaseException
    try:
        deep()
    except RecursionError as caught:
        exc = caught
    came = load_exception(dump_exception(exc))
    assert isinstance(came, RecursionError)
    assert len(traceback.extract_tb(came.__traceback__)) == 2 * MOST_FRAMES
    for _ in range(2000):
        exc = raised(ValueError("again"), context=exc)
    came = load_exception(dump_exception(exc))
    assert len(chain_of(came)) == MOST_EXCEPTIONS
    one, other = ValueError("one"), ValueError("other")
    one.__context__, other.__context__ = other, one
    again = load_exception(dump_exception(one))
    assert again.__context__ is not None and again.__context__.__context__ is again


def test_a_class_that_is_not_there_has_a_stand_in_with_type_message_and_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blob = dump_exception(raised(ValueError("outer"), cause=raised(AddsToItsMessage(3))))
    monkeypatch.delattr(sys.modules[__name__], "AddsToItsMessage")
    came = load_exception(blob)
    assert isinstance(came, ValueError)
    inner = came.__cause__
    assert isinstance(inner, RemoteTaskError) and isinstance(inner, HTCDaskError)
    assert inner.type_name.endswith("test_pickling.AddsToItsMessage") and inner.message == "code 3"
    assert "AttributeError" in inner.reason and "code 3" in str(inner)
    assert "in raised" in "".join(traceback.format_exception(came))
    assert str(pickle.loads(pickle.dumps(inner))) == str(inner)


def test_an_exception_without_words_arrives() -> None:
    assert isinstance(load_exception(dump_exception(raised(BrokenStr(1)))), BrokenStr)


def test_why_a_value_cannot_be_pickled_is_told_without_a_copy_of_it() -> None:
    for value in (None, 1, "text", b"x" * 10**6, np.ones(10), lambda x: x, [lambda: 1], {"a": np.array([None])}):
        assert why_unpicklable(value) is None
    assert "lock" in str(why_unpicklable([threading.Lock()]))
    assert "generator" in str(why_unpicklable(part for part in "ab"))


def completed(result: Any) -> Any:
    record = ResultRecord(result=result, metadata=ResultRecordMetadata(storage_key="there"))
    return Completed(data=record)


@pytest.mark.parametrize("copies", ["pickle", "dask"])
def test_a_result_arrives_as_before(copies: str) -> None:
    value = {"array": np.arange(1000), "function": lambda x: x + 1}
    state = portable(completed(value))
    assert state.data.result is value
    came = _sent(state, copies)
    assert came.id == state.id and came.is_completed() and came.timestamp == state.timestamp
    assert came.data.metadata.storage_key == "there"
    assert (came.data.result["array"] == value["array"]).all() and came.data.result["function"](1) == 2
    came.data.result["array"][0] = 5  # as writeable as it was


def test_large_arrays_are_not_copied_into_the_pickle() -> None:
    _, frames = serialize(portable(completed(np.ones(10**6))))
    assert max(memoryview(frame).nbytes for frame in frames) == 8 * 10**6
    assert len(frames[0]) < 10_000


@pytest.mark.parametrize("copies", ["pickle", "dask"])
def test_a_result_that_cannot_be_unpickled_arrives_as_a_failure_that_says_so(copies: str) -> None:
    state = portable(completed(BadUnpickle()))
    for _ in range(2):
        came = _sent(state, copies)
        # Copies too: Dask may give the flow the one that another worker holds.
        assert came.is_failed() and is_unreadable(came) and isinstance(came.data, UnpicklableResultError)
        assert "RuntimeError: this value refuses" in came.message
        assert isinstance(came.data.__cause__, RuntimeError)
        state = came


@pytest.mark.parametrize("copies", ["pickle", "dask"])
def test_a_state_with_an_exception_can_be_sent_on_and_packed(copies: str) -> None:
    state = portable(Failed(message="it failed", data=TwoArguments(404, "gone")))
    for _ in range(3):
        came = _sent(state, copies)
        assert came.is_failed() and came.id == state.id and came.message == "it failed"
        assert isinstance(came.data, TwoArguments) and str(came.data) == "404: gone"
        packed = CompactState(came)
        assert packed.state.data is came.data
        assert not is_unreadable(came)
        assert packed.without_data().state.data is None or packed.without_data().data is None
        state = packed.state


def _sent(state: Any, copies: str) -> Any:
    if copies == "dask":
        return deserialize(*serialize(state))
    pickle.loads(pickle.dumps(state, pickle.HIGHEST_PROTOCOL))
    return pickle.loads(pickle.dumps(state))
