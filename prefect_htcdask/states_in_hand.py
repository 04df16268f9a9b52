"""Final states that this process holds already, as arguments of further task runs.

A state goes along with each call that needs it. A large one becomes Dask data instead, and is sent once for all of
them: its worker may be gone, and the task run that ended in it must not run again.
"""

from __future__ import annotations

import contextvars
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from distributed import Client, Future
from distributed.protocol.pickle import dumps

from prefect_htcdask.graph_sending import send, sent_once
from prefect_htcdask.reconnection import ResumingClient
from prefect_htcdask.resubmission import loads_node, name_in_hand

if TYPE_CHECKING:
    from prefect_htcdask.futures import HTCDaskFuture

LIMIT = 256 * 1024
"""Bytes of a pickled state, at most, that go along with every call; a graph of its own costs about as much CPU time."""


def brought_back(client: Client, future: HTCDaskFuture[Any]) -> Future[Any] | None:
    """Dask's future of a state in hand, which lives for as long as `future` does.

    The state is that of the first time: what is changed in a result later, in place, is not sent again.

    Args:
        client: on whose scheduler tasks need it.
        future: has its final state.

    Returns:
        `None` where the state is better sent with each call.

    Raises:
        TaskRunLost: the connection to the scheduler was given up.
        Exception: the result cannot be pickled.
    """
    packed = future.packed
    assert packed is not None
    if packed.travels_along is True:
        return None
    there = future.brought_back
    if there is not None and there.client is client and there.status not in ("error", "cancelled"):
        return there
    blob = dumps(packed.state)
    packed.travels_along = len(blob) <= LIMIT
    if packed.travels_along:
        return None
    # A name that was lost with a connection may still be known as cancelled.
    future.times_brought_back += 1
    key = name_in_hand(str(future.task_run_id), future.times_brought_back)
    with client.steady() if isinstance(client, ResumingClient) else nullcontext(), sent_once(len(blob)):
        # Without the annotations of the task that needs it.
        future.brought_back = contextvars.Context().run(send, client, {key: loads_node(key, blob)}, [key], {})[0]
    return future.brought_back
