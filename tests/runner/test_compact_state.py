"""States are packed and unpacked without a difference to those who look at them."""

from __future__ import annotations

import gc
import pickle
import sys
import threading
import tracemalloc
import weakref
from typing import Any, cast
from uuid import uuid4

import pytest
from prefect._internal.result_records import ResultRecord, ResultRecordMetadata
from prefect.client.schemas.objects import State, StateDetails, StateType
from prefect.serializers import PickleSerializer
from prefect.states import Cancelled, Completed, Crashed, Failed, Paused, Running

from prefect_htcdask.runner.futures.compact_state import CompactState
from prefect_htcdask.runner.futures.futures import HTCDaskFuture
from prefect_htcdask.runner.futures.pending_result import PendingResult


class Unlike:
    """Equal to nothing but itself, and nothing that pickle takes."""

    def __reduce__(self) -> Any:
        raise TypeError("not to be pickled")


class UnlikelySerializer(PickleSerializer):
    """A serializer that pickle does not take."""

    type: str = "unlikely"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("not to be pickled")


def record(result: Any, **metadata: Any) -> ResultRecord[Any]:
    return ResultRecord(metadata=ResultRecordMetadata(storage_key="somewhere", **metadata), result=result)


RESULTS = [Unlike(), None, False, True, 0, 1, 7, "Completed", b"", [1], {}, StateType.COMPLETED, ValueError("returned")]


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: type(result).__name__)
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_state_comes_out_as_it_went_in(result: Any, wrapped: bool) -> None:
    state = Completed(
        name="Done",
        message="all of it",
        data=record(result) if wrapped else result,
        state_details=StateDetails(task_run_id=uuid4(), cache_key="k", untrackable_result=False),
    )
    packed = CompactState(state)
    other = packed.state
    assert other is not state and other == state and type(other) is type(state)
    assert (other.id, other.timestamp, other.name, other.message) == (state.id, state.timestamp, "Done", "all of it")
    assert other.model_fields_set == state.model_fields_set
    # The user's own object, not a copy of it.
    assert (other.data.result if wrapped else other.data) is result
    assert (packed.type, packed.name, packed.has_result) == (StateType.COMPLETED, "Done", wrapped)


def test_what_is_private_in_a_record_is_kept() -> None:
    persisted = record(3)
    persisted.mark_persisted()
    unpacked = CompactState(Completed(data=persisted)).state
    assert unpacked.data.is_persisted and not CompactState(Completed(data=record(3))).state.data.is_persisted


def test_it_is_the_same_object_while_somebody_holds_it() -> None:
    packed = CompactState(Completed(data=record([1])))
    first = packed.state
    assert packed.state is first
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None
    assert packed.state.data.result == [1]


def test_threads_that_unpack_at_the_same_time_get_one_object() -> None:
    for _ in range(50):
        packed, start, found = CompactState(Completed(data=record(1))), threading.Barrier(4), []

        def look(packed: Any = packed, start: Any = start, found: Any = found) -> None:
            start.wait()
            found.append(packed.state)

        threads = [threading.Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(map(id, found))) == 1


@pytest.mark.parametrize("result", [[1], Unlike()], ids=["list", "unlike"])
def test_without_data_it_lets_go_of_the_result(result: Any) -> None:
    state = Completed(data=record(result), message="here")
    light = CompactState(state).without_data()
    assert light.data is None and not light.has_result
    assert (light.state.id, light.state.message, light.state.timestamp) == (state.id, "here", state.timestamp)
    assert light.state.data.result is None


def test_what_pickle_does_not_take_is_kept_as_it_is() -> None:
    state = Completed(message="here", data=record([1], serializer=UnlikelySerializer()))
    packed = CompactState(state)
    assert packed.state is state and packed.has_result and packed.data == [1]
    light = packed.without_data()
    assert (light.state.id, light.state.message, light.state.data) == (state.id, "here", None)


@pytest.mark.slow
def test_it_takes_a_fraction_of_the_memory() -> None:
    state = Completed(data=record(0), state_details=StateDetails(task_run_id=uuid4()))

    def taken(keep: Any) -> float:
        gc.collect()
        tracemalloc.start()
        kept = [keep(pickle.loads(pickle.dumps(state))) for _ in range(200)]
        gc.collect()
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return size / len(kept)

    # What other threads of this process take meanwhile comes on top.
    whole, packed = (min(taken(keep) for _ in range(5)) for keep in (lambda state: state, CompactState))
    print(f"{whole:.0f} bytes a state, {packed:.0f} packed", file=sys.stderr)
    assert packed < 2000 and packed < whole / 3


def outcome(ask: Any) -> Any:
    """What a call returns or raises."""
    try:
        return "returned", ask()
    except BaseException as exc:
        return "raised", exc


@pytest.mark.parametrize("raise_on_failure", [True, False])
@pytest.mark.parametrize(
    "state",
    [
        Completed(data=record([1])),
        Completed(data=record(None)),
        Completed(data=record(ValueError("returned"))),
        Completed(data=[1]),
        Completed(data=None),
        Completed(name="Cached", data=record(7)),
        Completed(data=ResultRecordMetadata(storage_key="nowhere-at-all", prefect_version="3")),
        Failed(data=record(ValueError("raised"))),
        Failed(data=ValueError("raised")),
        Failed(data=None, message="no luck"),
        Failed(data=record("not an exception")),
        Crashed(data=ValueError("lost")),
        Cancelled(message="stopped"),
        Paused(timeout_seconds=1),
        Running(),
    ],
    ids=str,
)
def test_the_result_of_a_future_is_that_of_its_state(
    state: State[Any], raise_on_failure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefect.states.RESULT_READ_MAXIMUM_ATTEMPTS", 1)
    result = PendingResult(uuid4(), cast(Any, None))
    result.packed = CompactState(state)
    future: HTCDaskFuture[Any] = HTCDaskFuture(result)
    how, answer = outcome(lambda: future.result(raise_on_failure=raise_on_failure))
    how_, expected = outcome(lambda: state.result(raise_on_failure=raise_on_failure, _sync=True))  # type: ignore[call-overload]
    assert how == how_
    if isinstance(expected, BaseException) and answer is not expected:
        assert (type(answer), str(answer)) == (type(expected), str(expected))
    else:
        assert answer is expected
