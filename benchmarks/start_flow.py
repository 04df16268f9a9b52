"""The flow of the `start` benchmark: ``start_flow.py ours|peer`` prints the seconds to its first result."""

from __future__ import annotations

import json
import sys
import time

from prefect import flow, task
from prefect_dask import DaskTaskRunner

from prefect_htcdask import HTCDaskTaskRunner


@task
def answer() -> int:
    return 42


def measure() -> float:
    started = time.monotonic()
    assert answer.submit().result() == 42
    return time.monotonic() - started


def runner(who: str) -> DaskTaskRunner:
    if who == "ours":
        return HTCDaskTaskRunner(
            cluster_kwargs={"memory": "400 MiB", "disk": "100 MiB"}, adapt_kwargs={"minimum": 1, "maximum": 1}
        )
    return DaskTaskRunner(
        cluster_class="dask_jobqueue.HTCondorCluster",
        cluster_kwargs={
            "cores": 1,
            "memory": "400 MiB",
            "disk": "100 MiB",
            "n_workers": 1,
            "python": sys.executable,
            # The job's environment is empty otherwise, and the worker would start a Prefect server of its own.
            "job_extra_directives": {"getenv": "true"},
            "scheduler_options": {"host": "127.0.0.1"},
            "worker_extra_args": ["--host", "127.0.0.1"],
        },
    )


if __name__ == "__main__":
    seconds = flow(measure, name="start", task_runner=runner(sys.argv[1]), log_prints=False)()
    print(json.dumps({"seconds": seconds}))
