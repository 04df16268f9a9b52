"""What a Prefect server can take: ``python -m benchmarks.server_events TASKS`` prints a line of JSON.

The events of that many task runs are made by the engine itself and kept; then they are posted, a hundred at a time, and
nothing else happens meanwhile than that the server stores them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import httpx
from prefect import flow, task
from prefect.events.clients import AssertingEventsClient
from prefect.events.worker import EventsWorker
from prefect.runtime import flow_run
from prefect.task_engine import run_task_sync

AT_ONCE = 100


@task
def nothing(x: Any) -> int:
    """A no-op task."""
    return 0


@flow
def kept_events(count: int) -> tuple[str, list[dict[str, Any]]]:
    """Run tasks, and give the flow run's id and the events of their task runs in the order they were sent in."""
    EventsWorker.set_client_override(AssertingEventsClient)
    try:
        for number in range(count):
            run_task_sync(task=nothing, parameters={"x": number})
        EventsWorker.drain_all(timeout=60)
    finally:
        EventsWorker.set_client_override(None)
    events = [event for client in AssertingEventsClient.all for event in client.events]
    return str(flow_run.id), [
        event.model_dump(mode="json") for event in events if event.event.startswith("prefect.task-run.")
    ]


def main(count: int) -> None:
    """Measure, and print."""
    flow_run_id, events = kept_events(count)
    wanted = {
        "flow_runs": {"id": {"any_": [flow_run_id]}},
        "task_runs": {"state": {"type": {"any_": ["COMPLETED"]}}},
    }
    with httpx.Client(base_url=os.environ["PREFECT_API_URL"], timeout=60) as api:
        assert api.post("/task_runs/count", json=wanted).raise_for_status().json() == 0
        started = time.monotonic()
        for first in range(0, len(events), AT_ONCE):
            api.post("/events", json=events[first : first + AT_ONCE]).raise_for_status()
        posted = time.monotonic() - started
        while api.post("/task_runs/count", json=wanted).raise_for_status().json() < count:
            if time.monotonic() - started > 300:
                raise RuntimeError("the server has not stored all task runs within 300 s")
            time.sleep(0.1)
        stored = time.monotonic() - started
    print(json.dumps({"events": len(events), "posted_seconds": posted, "stored_seconds": stored}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
