"""Prefect's events of a worker, kept through an outage of the API.

Prefect's client tries to send an event for eight seconds. What it could not send then waits for the next event, or half
a minute, and dies with a worker that leaves before; and where it cannot connect at first, all that is queued is
dropped (prefect 3.8, `PrefectEventsClient._emit`, `_QueueServiceBase._run`). Task runs would be Running for ever.
"""

from __future__ import annotations

ATTEMPTS = 100_000
"""A second lies between two attempts to reach the API: more than a day."""


def keep_trying() -> None:
    """Have this process keep its events, in their order, until the API takes them.

    Only for a process that ends without waiting for them (`os._exit`), such as a worker job's: Prefect itself waits at
    the interpreter's end until all is sent.
    """
    from prefect.events.clients import PrefectCloudEventsClient, PrefectEventsClient
    from prefect.events.worker import EventsWorker, emit_events_to_cloud

    client = PrefectCloudEventsClient if emit_events_to_cloud() else PrefectEventsClient
    EventsWorker.set_client_override(client, reconnection_attempts=ATTEMPTS)
