"""Final states that this process holds already, as arguments of further task runs.

A state goes along with each call that needs it. A large one becomes Dask data instead, and is sent once for all of
them: its worker may be gone, and the task run that ended in it must not run again.
"""

from __future__ import annotations

import threading
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, TypeAlias
from uuid import UUID
from weakref import WeakKeyDictionary, WeakValueDictionary

from distributed import Future
from distributed.protocol.pickle import dumps

from prefect_htcdask.runner.client.connection import Connection
from prefect_htcdask.runner.client.uploaded_state import UploadedState
from prefect_htcdask.runner.futures.pending_result import PendingResult

LIMIT = 256 * 1024
"""Bytes of a pickled state, at most, that go along with every call; a graph of its own costs about as much CPU time."""

KEPT = 256 * 1024**2
"""Bytes of states that stay on the cluster for calls to come; the scheduler holds them as well. Others are there for as
long as a task needs them, and the last one is always kept."""


_Which: TypeAlias = "tuple[UUID, frozenset[tuple[str, float]]]"


class LargeStates:
    """Brings states back to the cluster of one client.

    Args:
        connection: to the scheduler on which tasks need them.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._there: WeakValueDictionary[_Which, Future[Any]] = WeakValueDictionary()
        self._kept: OrderedDict[_Which, Future[Any]] = OrderedDict()
        self._sizes: WeakKeyDictionary[Future[Any], int] = WeakKeyDictionary()

    def upload(self, result: PendingResult, resources: Mapping[str, float] | None) -> Future[Any] | None:
        """Dask's future of a state in hand; whoever needs it holds it.

        The state is that of the first time: what is changed in a result later, in place, is not sent again.

        Args:
            result: has its final state.
            resources: what the task that needs it asks Dask for; another worker group may have no workers.

        Returns:
            `None` where the state is better sent with each call.

        Raises:
            TaskRunLost: the connection to the scheduler was given up.
            Exception: the result cannot be pickled.
        """
        packed = result.packed
        assert packed is not None
        if packed.travels_along:
            return None
        # One that waits for a GPU is of no use to a task that needs none.
        which = result.task_run_id, frozenset((resources or {}).items())
        # A second thread that needs the same one does not send it again, but waits for the first.
        with self._lock:
            there = self._there.get(which)
            if there is None or there.status in ("error", "cancelled"):
                blob = dumps(packed.state)
                packed.travels_along = len(blob) <= LIMIT
                if packed.travels_along:
                    return None
                # A key of its own each time: Dask may still know another as cancelled.
                there = self._connection.upload(UploadedState(f"state_in_hand-{uuid.uuid4()}", blob, resources))
                self._there[which], self._sizes[there] = there, len(blob)
            self._kept[which] = there
            self._kept.move_to_end(which)
            while len(self._kept) > 1 and sum(self._sizes[one] for one in self._kept.values()) > KEPT:
                self._kept.popitem(last=False)
            return there

    def close(self) -> None:
        """Keep nothing any more."""
        with self._lock:
            self._kept.clear()
