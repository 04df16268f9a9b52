"""What the preload of a worker does in its process, for good: in a process of its own."""

from __future__ import annotations

import subprocess
import sys

PRELOADED = """
import asyncio, gc, types
from prefect.events.worker import EventsWorker
from prefect_htcdask.worker.run_task import dask_setup

asyncio.run(dask_setup(types.SimpleNamespace()))
print(dict(EventsWorker._client_override[1])["reconnection_attempts"] > 24 * 3600, gc.get_freeze_count() > 50_000)
"""


def test_events_outlast_a_day_without_the_api_and_imports_are_frozen() -> None:
    done = subprocess.run([sys.executable, "-c", PRELOADED], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "True"], done.stderr
