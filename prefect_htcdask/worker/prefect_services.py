"""Prefect's events and logs of a worker: kept through an outage of the API, and sent in batches.

Prefect's client tries to send an event for eight seconds. What it could not send then waits for the next event, or half
a minute, and dies with a worker that leaves before; and where it cannot connect at first, all that is queued is
dropped (prefect 3.8, `PrefectEventsClient._emit`, `_QueueServiceBase._run`). Task runs would be Running for ever.
"""

from __future__ import annotations

import asyncio
from functools import wraps
from queue import Empty
from typing import Any

ATTEMPTS = 100_000
"""A second lies between two attempts to reach the API: more than a day."""

PAUSE = 0.1
"""Seconds for which a service waits for more items, once its queue is empty."""


def keep_trying() -> None:
    """Have this process keep its events, in their order, until the API takes them.

    Only for a process that ends without waiting for them (`os._exit`), such as a worker job's: Prefect itself waits at
    the interpreter's end until all is sent.
    """
    from prefect.events.clients import PrefectCloudEventsClient, PrefectEventsClient
    from prefect.events.worker import EventsWorker, emit_events_to_cloud

    client = PrefectCloudEventsClient if emit_events_to_cloud() else PrefectEventsClient
    EventsWorker.set_client_override(client, reconnection_attempts=ATTEMPTS)


def send_in_batches(*services: Any) -> None:
    """Have this process's services of Prefect take all that came within `PAUSE` from their queues at once.

    For each item, Prefect has a thread wait for the queue and wakes the service's event loop (prefect 3.8,
    `_QueueServiceBase._main_loop`). Of the engine's CPU time for a no-op task run, with its three events, that is a
    fifth.

    Args:
        services: classes of services, such as `prefect.events.worker.EventsWorker`.
    """
    for service in services:
        service.__init__ = _taking_batches(service.__init__)


def _taking_batches(init: Any) -> Any:
    @wraps(init)
    def init_with_batches(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        # Private to Prefect: where a later release has neither, its services go on as they do there.
        if hasattr(self, "_queue_get_thread") and hasattr(self, "_queue"):
            self._queue_get_thread = BatchThread(self)

    return init_with_batches


class BatchThread:
    """Stands for the thread in which a service waits for its queue, and asks it only for what begins a batch."""

    def __init__(self, service: Any) -> None:
        self._service = service
        self._thread = service._queue_get_thread

    def start(self) -> None:
        """Start the thread itself."""
        self._thread.start()

    def shutdown(self) -> None:
        """End the thread itself."""
        self._thread.shutdown()

    def submit(self, get: Any) -> NextItem:
        """Take the next item; `get` is the call that would wait for it in the thread."""
        return NextItem(self._service, self._thread, get)


class NextItem:
    """Stands for the call that gets a service's next item."""

    def __init__(self, service: Any, thread: Any, get: Any) -> None:
        self._service = service
        self._thread = thread
        self._get = get

    async def aresult(self) -> Any:
        """The item; `None` where the service is to end.

        Raises:
            queue.Empty: there was none in the time that the call gives.
        """
        for pause in (0, PAUSE):
            # Even where many are waiting, others that use the event loop have their turn.
            await asyncio.sleep(pause)
            try:
                return self._service._queue.get_nowait()
            except Empty:
                pass
        return await self._thread.submit(self._get).aresult()
