"""Artifacts of a flow run."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from prefect import flow, get_client
from prefect.runtime import flow_run as flow_run_runtime


def artifacts_of(flow_run_id: Any) -> dict[str, dict[str, Any]]:
    """A flow run's artifacts at the API, by their keys without the flow's name."""
    with get_client(sync_client=True) as client:
        answer = client._client.post(
            "/artifacts/filter", json={"flow_runs": {"id": {"any_": [str(flow_run_id)]}}, "limit": 100}
        )
        answer.raise_for_status()
    # Prefect keeps some results as artifacts without a key.
    return {one["key"]: one for one in answer.json() if one["key"]}


def message(number: int, jobs: int = 60) -> dict[str, Any]:
    row = {
        "id": "1.0",
        "group": "default",
        "state": "running",
        "host": "slot1@a",
        "submitted": 1.0,
        "start": 1_795_000_000.0,
        "end": None,
        "reason": "",
        "core_hours": 0.1 * number,
        "memory_mib": 310.0,
        "request_mib": 2048.0,
    }
    return {
        "kind": "progress",
        "tasks": {"done": number, "known": 10_000},
        "queued": 3,
        "workers": {"default": {"pending": 1, "running": 2, "idle": 3}},
        "states": {"running": jobs},
        "jobs": [{**row, "id": f"1.{index}"} for index in range(min(jobs, 50))],
    }


@pytest.fixture
def flow_run_id() -> UUID:
    @flow
    def computing() -> Any:
        return flow_run_runtime.id

    return UUID(computing())
