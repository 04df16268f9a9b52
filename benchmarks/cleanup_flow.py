"""The flow of the `cleanup` benchmark: ``cleanup_flow.py JOBS IDLE`` ends when IDLE of its JOBS wait in the queue."""

from __future__ import annotations

import json
import sys
import time

import htcondor2
from prefect import flow, task

from prefect_htcdask import HTCDaskTaskRunner

JOBS, IDLE = int(sys.argv[1]), int(sys.argv[2])


@task
def answer() -> int:
    return 42


@flow(
    task_runner=HTCDaskTaskRunner(
        cluster_kwargs={"memory": "400 MiB", "disk": "100 MiB"}, adapt_kwargs={"minimum": JOBS, "maximum": JOBS}
    )
)
def hold_jobs() -> None:
    assert answer.submit().result() == 42
    schedd = htcondor2.Schedd()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        status = [ad["JobStatus"] for ad in schedd.query("true", ["JobStatus"])]
        if len(status) >= JOBS and status.count(1) >= IDLE:
            break
        time.sleep(0.1)
    print(json.dumps({"time": time.time(), "idle": status.count(1), "running": status.count(2)}), flush=True)


if __name__ == "__main__":
    hold_jobs()
