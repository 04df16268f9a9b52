"""Private names of Dask and distributed. Each function says what it stands in for; checked with distributed 2026.8.

Elsewhere are the private methods that subclasses override, each of which says so: `Client._close` and `_reconnect`
(`runner.client.client`), `Worker.trigger_profile` (`worker.dask_worker`); and what runs on the scheduler, which travels
there by value and imports nothing (`scheduler`).
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from dask._expr import LLGExpr
from dask._task_spec import Alias as Alias
from dask._task_spec import DataNode as DataNode
from dask._task_spec import List as List
from dask._task_spec import Task as GraphTask
from distributed import Client, Future, Worker
from distributed.spans import SpanMetadata

__all__ = ["Alias", "DataNode", "GraphTask", "List"]

TOGETHER = "100 ms"
"""Graphs that come within this time are of one generation for Dask, and their tasks' own order decides; as in
`distributed.Client.submit`."""


def send(
    client: Client,
    nodes: Mapping[str, Any],
    keys: Iterable[str],
    order: Mapping[str, int],
    resources: Mapping[str, float] | None = None,
) -> list[Future[Any]]:
    """Send a graph without waiting for it. Annotations are left to `dask.annotate`.

    Stands in for: `distributed.Client.get`, which would leave the order to `dask.order`; that puts independent tasks
    the last first.

    Args:
        client: sends it, with the method that its `submit`, `map` and `get` are made of.
        nodes: the graph, by key.
        keys: what is wanted of it.
        order: numbers by key; the lower runs first. Nodes that have none come before all others of the graph.
        resources: what each task asks Dask for.

    Returns:
        the futures of `keys`, in their order.
    """
    wanted = list(keys)
    first = min((order[key] for key in nodes if key in order), default=0) - 1
    futures: dict[str, Future[Any]] = cast(Any, client)._graph_to_futures(
        # The token spares Dask hashing every argument.
        LLGExpr(dict(nodes), _determ_token=uuid.uuid4().hex),
        wanted,
        span_metadata=SpanMetadata(collections=[{"type": "low-level-graph"}]),
        internal_priority={key: order.get(key, first) for key in nodes},
        fifo_timeout=TOGETHER,
        resources=resources,
    )
    return [futures[key] for key in wanted]


def on_end(future: Future[Any], call: Callable[[], None]) -> None:
    """Have `call` called in the event loop once a future is not pending any more; at once if it is not.

    Stands in for: `distributed.Future.add_done_callback`, which has a coroutine wait for each future and hands each
    call to another thread; a map of 50,000 tasks has 50,000 of these at once. Here the event that Dask sets at a
    future's end makes the call itself.

    To be called in the event loop of the future's client.

    Args:
        future: of any status.
        call: does not block, and does not raise.
    """
    if future.status != "pending":
        call()
        return
    state = cast(Any, future)._state
    if getattr(state, "_event", state) is None:
        state._event = CallbackEvent(call)
    else:
        # Somebody waits for it already, or another release of Dask keeps its event elsewhere.
        future.add_done_callback(lambda _: call())


class CallbackEvent:
    """In the place of the `asyncio.Event` of Dask's `FutureState`; makes its call once, as it is set.

    Args:
        call: called in the event loop.
    """

    __slots__ = ("_call", "_event", "_is_set")

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call
        self._is_set = False
        # Of those who wait as Dask does; hardly ever there, and larger than the rest.
        self._event: asyncio.Event | None = None

    def is_set(self) -> bool:
        """As `asyncio.Event.is_set`."""
        return self._is_set

    def set(self) -> None:
        """As `asyncio.Event.set`."""
        self._is_set = True
        if self._event is not None:
            self._event.set()
        call, self._call = self._call, None
        if call is not None:
            call()

    def clear(self) -> None:
        """As `asyncio.Event.clear`."""
        self._is_set = False
        if self._event is not None:
            self._event.clear()

    async def wait(self) -> bool:
        """As `asyncio.Event.wait`."""
        if self._is_set:
            return True
        if self._event is None:
            self._event = asyncio.Event()
        return await self._event.wait()


def drop_pending_messages(client: Client, unwanted: Callable[[dict[str, Any]], bool]) -> None:
    """Forget messages that a client still had to send as its connection broke.

    Stands in for: `distributed.Client._ensure_connected`, which sends all of them over the next connection.
    """
    buffer: Any = cast(Any, client)._pending_msg_buffer
    buffer[:] = [message for message in buffer if not unwanted(message)]


async def connect(client: Client, timeout: float) -> None:
    """Connect a client to its scheduler again.

    Stands in for: `distributed.Client._reconnect`, which cancels all futures first.

    Raises:
        OSError: there is no connection within so many seconds.
    """
    await cast(Any, client)._ensure_connected(timeout=timeout)
    if client.scheduler_comm is None:
        raise OSError("no connection")


def send_to_scheduler(client: Client, message: dict[str, Any]) -> None:
    """Send a message of a client's stream.

    Stands in for: what `distributed.Client.subscribe_topic` and others are made of.
    """
    cast(Any, client)._send_to_scheduler(message)


def subscribed_topics(client: Client) -> list[str]:
    """The topics that a client has subscribed to, which the next scheduler connection does not know of."""
    return list(cast(Any, client)._event_handlers)


def scheduler_id(client: Client) -> str | None:
    """The id of the scheduler that a client was connected to last: another one has another."""
    identity: Any = cast(Any, client)._scheduler_identity
    return identity.get("id") if identity else None


def connect_timeout(client: Client) -> float:
    """Seconds in which a client would have to connect."""
    return float(cast(Any, client)._timeout)


def error_of(future: Future[Any]) -> BaseException | None:
    """The exception with which Dask gave a task up, as it came; `None` where there is none.

    Stands in for: `distributed.Future.exception`, which asks the event loop and cannot be called in it.
    """
    error: BaseException | None = cast(Any, future)._state.exception if future.status == "error" else None
    return error


async def wait_for_end(future: Future[Any]) -> None:
    """Wait in the event loop until a future is not pending.

    Stands in for: `distributed.Future._result`, which gathers the result.
    """
    await cast(Any, future)._state.wait()


def own_client(worker: Worker) -> Client | None:
    """The client that a worker keeps for its tasks, if it has made one.

    Stands in for: `distributed.Worker._get_client`, which does not look whether it is closed.
    """
    client: Client | None = cast(Any, worker)._client
    return client


def set_own_client(worker: Worker, client: Client) -> None:
    """Have a worker keep a client for its tasks, and close it with itself."""
    inside: Any = worker
    inside._client = client
    inside._initialized_clients.add(client)


def set_client_factory(worker: Worker, factory: Callable[..., Client]) -> None:
    """Have `distributed.get_client` in a task of this worker give what `factory` gives."""
    inside: Any = worker
    if "_get_client" not in vars(worker):
        inside._get_client = factory


def close_soon(client: Client, worker: Worker) -> None:
    """Close a client in its worker's event loop, without waiting for it."""
    worker.loop.add_callback(cast(Any, client)._close)


def give_back_resources(worker: Worker, key: Any, which: Callable[[str], bool]) -> None:
    """Have a running task no longer hold the resources whose names `which` is true of; in the worker's event loop.

    Stands in for: an argument of `distributed.secede`, after which a task keeps its resources
    (`distributed.worker_state_machine`).
    """
    task = worker.state.tasks.get(key)
    if task is None or not task.resource_restrictions:
        return
    kept = {}
    for name, amount in task.resource_restrictions.items():
        if which(name):
            worker.state.available_resources[name] += amount
        else:
            kept[name] = amount
    # What Dask gives back when the task ends.
    task.resource_restrictions = kept
