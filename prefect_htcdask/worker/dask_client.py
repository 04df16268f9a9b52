"""The Dask client of a worker, which all of its tasks share: what `distributed.get_client` gives in a task.

Dask's own way takes whatever client was made last in the process, such as one that another task is about to close, and
keeps it for good (distributed, `Worker._get_client`). Here a worker has a client of its own; a task that has made
another for itself has that one, for as long as it is open.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeGuard

import dask
from dask.utils import parse_timedelta
from distributed import Client, Future, Worker
from distributed.utils import in_async_call

from prefect_htcdask.compat.dask import close_soon, own_client, set_client_factory, set_own_client
from prefect_htcdask.worker.secede import seceded

_WAITS = frozenset({"_gather", "_result", "_exception", "_traceback", "_wait", "_as_completed"})
"""What `Client.sync` runs where somebody waits for futures (distributed, `client.py`)."""

_CLOSED = ("closing", "closed")

_lock = threading.Lock()


class WorkerClient(Client):
    """A client in a task: a wait for futures frees the task's slot on its worker, which those may need."""

    def sync(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """As `distributed.Client.sync`."""
        asynchronous = kwargs.get("asynchronous")
        blocks = func.__name__ in _WAITS and not (self.asynchronous if asynchronous is None else asynchronous)
        future = getattr(func, "__self__", None)
        with seceded(blocks and not (isinstance(future, Future) and future.done())):
            return super().sync(func, *args, **kwargs)


def give_own_client(worker: Worker) -> None:
    """Have `distributed.get_client` give the tasks of this worker a client that nobody closes."""
    set_client_factory(worker, partial(client_of, worker))


def client_of(worker: Worker, timeout: float | None = None) -> Client:
    """The client that a task uses on its worker: one that it has made for itself, else the worker's own.

    Args:
        worker: the worker.
        timeout: seconds that connecting may take.

    Raises:
        OSError: the scheduler cannot be reached.
    """
    address = worker.scheduler.address
    with suppress(ValueError):
        current = Client.current(allow_global=False)
        if current.status not in _CLOSED and current.scheduler is not None and current.scheduler.address == address:
            return current
    with _lock:
        own = own_client(worker)
        if _is_usable(own):
            return own
    if timeout is None:
        timeout = parse_timedelta(dask.config.get("distributed.comm.timeouts.connect"))
    # Not within the lock: a thread that connects needs the event loop, which may come by here for itself.
    client = WorkerClient(
        address,
        loop=worker.loop,
        security=worker.security,
        set_as_default=False,
        asynchronous=in_async_call(worker.loop),
        direct_to_workers=True,
        name="worker",
        timeout=timeout,
    )
    with _lock:
        own = own_client(worker)
        if _is_usable(own):
            close_soon(client, worker)
            return own
        set_own_client(worker, client)
    return client


def _is_usable(client: Client | None) -> TypeGuard[Client]:
    return isinstance(client, WorkerClient) and client.status not in _CLOSED
