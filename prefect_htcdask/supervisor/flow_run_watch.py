"""Watches the flow run's state in the Prefect API: a flow run that was cancelled or ended needs no workers. Where its
process is dead, the cleanup's Prefect event is sent from here.

The one part of the supervisor that knows Prefect. A flow started by plain ``python flow.py`` has no Prefect process
beside it, so an API cancel reaches nobody else.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from uuid import UUID

from prefect_htcdask.condor.submit_description import FlowRunTag
from prefect_htcdask.supervisor.report.events import EventSpec, flow_run_resource

logger = logging.getLogger(__name__)

_FIRST_LOOK = 10.0
_INTERVAL = 5.0
_TELLING_TIME = 30.0
_ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED", "CANCELLING"}


async def flow_run_ended(flow_run_id: str, environment: Mapping[str, str]) -> str:
    """Wait until a flow run is terminal or cancelling; return that state's type.

    Args:
        flow_run_id: the flow run.
        environment: Prefect settings that reach its API, as environment variables; they stay in this process.

    A Prefect API outage is no end: it is asked again. A flow run that the API does not know counts as unwatched.
    """
    if "PREFECT_API_URL" not in environment:
        await asyncio.Event().wait()
    # Prefect takes over a second to import; the workers' start comes first.
    await asyncio.sleep(_FIRST_LOOK)
    os.environ.update(environment)
    api = await asyncio.to_thread(_import_api)
    run_id = UUID(flow_run_id)
    while True:
        try:
            async with api.open_async_client() as client:
                while True:
                    flow_run = await client.read_flow_run(run_id)
                    state = flow_run.state.type.value if flow_run.state else ""
                    if state in _ENDED:
                        return str(state)
                    await asyncio.sleep(_INTERVAL)
        except Exception as exc:  # an outage has many faces, and none of them ends a flow run
            logger.info("the Prefect API did not answer: %s: %s", type(exc).__name__, exc)
            await asyncio.sleep(_INTERVAL)


async def tell_of_cleanup(event: EventSpec, flow_run: FlowRunTag, environment: Mapping[str, str]) -> bool:
    """Send the event of a cleanup, where nobody else is left to send it; returns whether it was sent.

    Args:
        event: the event.
        flow_run: the flow run whose process is dead.
        environment: Prefect settings that reach its API, as environment variables; they stay in this process.
    """
    if "PREFECT_API_URL" not in environment:
        return False
    os.environ.update(environment)
    try:
        await asyncio.wait_for(_send(event, flow_run), _TELLING_TIME)
    except Exception as exc:  # an outage has many faces, and the cleanup is done
        logger.warning("the Prefect API was not told of the cleanup: %s: %s", type(exc).__name__, exc)
        return False
    return True


async def _send(event: EventSpec, flow_run: FlowRunTag) -> None:
    clients, schemas = await asyncio.to_thread(_import_events)
    async with clients.get_events_client() as client:
        await client.emit(
            schemas.Event(
                event=event.name,
                resource=event.resource,
                related=[flow_run_resource(flow_run.id, flow_run.name)],
                payload=event.payload,
                occurred=datetime.now(timezone.utc),
            )
        )


def _import_events():  # type: ignore[no-untyped-def]
    import prefect.events.clients as clients
    import prefect.events.schemas.events as schemas

    return clients, schemas


def _import_api():  # type: ignore[no-untyped-def]
    from prefect_htcdask.utils import prefect_client

    return prefect_client
