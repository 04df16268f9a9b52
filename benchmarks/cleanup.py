"""From the end of the flow's function to no job in the queue in any state, with 500 idle jobs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.parts import PREFIX, QueueWatch, environment, pool, server
from benchmarks.result import Result

IDLE_JOBS = 500
SECONDS = 3.0
FLOW = Path(__file__).with_name("cleanup_flow.py")


def run() -> Result:
    """Run a flow that holds 500 idle jobs when it ends, and watch the queue."""
    with pool() as endpoint, server(), environment(**{f"{PREFIX}ADAPTIVE_MAX_IDLE_JOBS": "1000"}):
        slots = 8
        flow = subprocess.Popen(
            [sys.executable, str(FLOW), str(IDLE_JOBS + slots), str(IDLE_JOBS)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert flow.stdout is not None
        line = flow.stdout.readline()
        if not line.strip():
            raise RuntimeError(f"the flow failed:\n{flow.communicate()[1][-4000:]}")
        ended = json.loads(line)
        gone = QueueWatch("true", 0, at_most=True, timeout=60).when()
        flow.communicate(timeout=60)
        del endpoint
    seconds = gone - ended["time"]
    return Result(
        "cleanup",
        metrics={"seconds": seconds, "idle_jobs": ended["idle"], "running_jobs": ended["running"]},
        goal={"seconds_below": SECONDS, "idle_jobs_at_least": IDLE_JOBS},
        checks={"seconds": seconds < SECONDS, "idle_jobs": ended["idle"] >= IDLE_JOBS},
    )
