"""Prefect events, as a server has them."""

from __future__ import annotations

from typing import Any

from prefect.client.orchestration import get_client


def events_of(flow_run_id: str) -> list[dict[str, Any]]:
    """Our events at the API that are related to a flow run, in order."""
    query = {
        "filter": {
            "event": {"prefix": ["htcdask."]},
            "related": {"id": [f"prefect.flow-run.{flow_run_id}"]},
        },
        "limit": 50,
    }
    with get_client(sync_client=True) as client:
        answer = client._client.post("/events/filter", json=query)
        answer.raise_for_status()
    return sorted(answer.json()["events"], key=lambda event: event["occurred"])


def names_of(flow_run_id: str) -> set[str]:
    return {event["event"] for event in events_of(flow_run_id)}
