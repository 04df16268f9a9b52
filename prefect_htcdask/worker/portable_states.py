"""Final states that any process can unpickle, whatever a task returned or raised.

Dask gathers results together, and a worker that cannot unpickle what a task needs leaves that task waiting for ever
(dask/distributed issue 6705). So what the user's code has in a state is pickled by itself, inside the state's pickle.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

from distributed.protocol.pickle import dumps
from prefect.client.schemas.objects import State
from prefect.states import Failed
from pydantic import PrivateAttr

from prefect_htcdask.compat.prefect import become, data_of, put_data
from prefect_htcdask.errors import UnpicklableResultError
from prefect_htcdask.worker.pickling import dump_exception, load_exception

_OUT_OF_BAND = 5
"""The protocol of pickle from which large buffers may go beside the pickle (PEP 574)."""

_SIMPLE = frozenset({type(None), bool, int, float, str})
"""What is unpickled anywhere, and quickest within the state itself."""


class PortableState(State[Any]):
    """A final state, as it leaves the process in which the task ran; there it has the very result or exception."""

    _exception: bytes | None = PrivateAttr(None)
    _unreadable: bool = PrivateAttr(False)

    def __reduce_ex__(self, protocol: Any) -> Any:
        light = copy.copy(self)
        become(light, State, None)
        put_data(light, None)
        if self._exception is not None:
            return _with_exception, (light, self._exception, self._unreadable)
        if protocol < _OUT_OF_BAND:
            return _with_result, (light, dumps(data_of(self), protocol=protocol))
        buffers: list[pickle.PickleBuffer] = []
        blob = dumps(data_of(self), buffer_callback=buffers.append)
        # Out of band, where the pickler of the whole can do that: neither is copied.
        return _with_result, (light, pickle.PickleBuffer(blob), *buffers)


def portable(state: State[Any]) -> State[Any]:
    """A state that can be unpickled anywhere; the same object.

    Raises:
        Exception: what is in it cannot be pickled, when it is; see `pickling.why_unpicklable`.
    """
    data = data_of(state)
    if type(data) not in _SIMPLE and not isinstance(state, PortableState):
        exception = dump_exception(data) if isinstance(data, BaseException) else None
        become(state, PortableState, {"_exception": exception, "_unreadable": False})
    return state


def _with_exception(state: State[Any], blob: bytes, unreadable: bool) -> State[Any]:
    put_data(state, load_exception(blob))
    # As it is sent on, such as to a task that it is a parameter of. A worker that could not read a result holds a copy
    # of it for Dask all the same, which anybody may be given.
    become(state, PortableState, {"_exception": blob, "_unreadable": unreadable})
    return state


def _with_result(state: State[Any], blob: Any, *buffers: Any) -> State[Any]:
    try:
        put_data(state, pickle.loads(blob, buffers=buffers))
    except Exception as exc:
        return _unreadable(state, exc)
    return state


def _unreadable(state: State[Any], reason: Exception) -> State[Any]:
    error = UnpicklableResultError(
        f"the result of the task run cannot be unpickled in this process: {type(reason).__name__}: {reason}. It needs "
        "the packages, in the versions, that the worker has; or the task is to return what any process can unpickle"
    )
    error.__cause__ = reason
    failed: State[Any] = Failed(message=str(error), data=error)
    failed.state_details = state.state_details
    become(failed, PortableState, {"_exception": dump_exception(error), "_unreadable": True})
    return failed


def is_unreadable(state: State[Any]) -> bool:
    """Whether a state stands for one whose result could not be unpickled here, of which its worker knows nothing."""
    return isinstance(state, PortableState) and state._unreadable
