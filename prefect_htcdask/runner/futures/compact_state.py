"""Final states that take little memory: what a process keeps of each task run that has ended.

Prefect's `State` is a model of models, about 8 KiB of memory; its pickle is an eighth of that. So the pickle is kept,
with the user's data beside it, as the very object that arrived.
"""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

from prefect.client.schemas.objects import State, StateType

from prefect_htcdask.compat.prefect import ResultRecord, data_of, put_data

_lock = threading.Lock()


class CompactState:
    """A final state, packed.

    Attributes:
        type: the state's type.
        name: the state's name.
        data: the user's data in it: the result, where it came in a record, else whatever the state's own data is.
        has_result: whether `data` is the result of a completed task run.
        travels_along: whether the state goes along with each call that needs it (`LargeStates`), once that is known.
    """

    __slots__ = ("_pickle", "_state", "data", "has_result", "name", "travels_along", "type")

    def __init__(self, state: State[Any]) -> None:
        self.type: StateType = state.type
        self.name = sys.intern(str(state.name or ""))
        self.data: Any = data_of(state)
        self.has_result = isinstance(state.data, ResultRecord) and state.is_completed()
        self.travels_along: bool | None = None
        self._pickle = b""
        self._state: Callable[[], State[Any] | None] = _nobody
        try:
            self._pickle = _pack(state, self.data)
        except Exception:
            # A result's serializer of the user's own may be unlike anything that pickle takes.
            self._state = lambda: state

    @property
    def state(self) -> State[Any]:
        """The state itself; the same object for as long as somebody holds it."""
        state = self._state()
        if state is None:
            unpacked = _unpack(self._pickle, self.data)
            with _lock:
                state = self._state()
                if state is None:
                    self._state, state = weakref.ref(unpacked), unpacked
        return state

    def without_data(self) -> CompactState:
        """The same state with nothing in the place of the user's data, which may be large."""
        if not self._pickle:
            return CompactState(without_data(self.state))
        light = CompactState.__new__(CompactState)
        light.type, light.name, light.data, light.has_result = self.type, self.name, None, False
        light._pickle, light._state, light.travels_along = self._pickle, _nobody, None
        return light


def _nobody() -> None:
    return None


def _pack(state: State[Any], data: Any) -> bytes:
    """Pickle a state with nothing in the place of the user's data; the state itself is left alone."""
    light = copy.copy(state)
    if data is not None:
        put_data(light, None)
    return pickle.dumps(light, pickle.HIGHEST_PROTOCOL)


def _unpack(packed: bytes, data: Any) -> State[Any]:
    state: State[Any] = pickle.loads(packed)
    put_data(state, data)
    return state


def without_data(state: State[Any]) -> State[Any]:
    """A state as the API takes it. It keeps its id, by which the API knows what it has heard of already."""
    # Not by model_copy, which resets the timestamp of a state.
    return State(id=state.id, type=state.type, name=state.name, message=state.message, timestamp=state.timestamp)
