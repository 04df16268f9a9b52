"""From ``scale(500)`` on a live cluster to 500 jobs in the queue, against dask_jobqueue's HTCondorCluster."""

from __future__ import annotations

import sys
import time

from benchmarks.parts import QueueWatch, pool
from benchmarks.result import Result

JOBS = 500
FASTER = 20.0


def run() -> Result:
    """Measure both on the same pool, one after the other; no job may start, so that only submission counts."""
    with pool():
        ours = _ours()
        print(f"ours {ours:.3f} s", file=sys.stderr)
        peer = _peer()
    ratio = peer / ours
    return Result(
        "submit",
        metrics={"jobs": JOBS, "seconds": ours, "jobs_per_second": JOBS / ours, "times_faster": ratio},
        peers={"HTCondorCluster": {"seconds": peer, "jobs_per_second": JOBS / peer}},
        goal={"times_faster_at_least": FASTER},
        checks={"times_faster": ratio >= FASTER},
    )


def _ours() -> float:
    from prefect_htcdask import HTCGatewayCluster
    from prefect_htcdask.condor.submit_description import cluster_constraint, cluster_digest

    with HTCGatewayCluster(memory="300 MiB", disk="100 MiB", requirements="false") as cluster:
        watch = QueueWatch(cluster_constraint(cluster_digest(cluster.name)), JOBS)
        started = time.time()
        cluster.scale(JOBS)
        return watch.when() - started


def _peer() -> float:
    from dask_jobqueue import HTCondorCluster

    with HTCondorCluster(
        cores=1,
        memory="300 MiB",
        disk="100 MiB",
        job_extra_directives={"requirements": "false"},
        scheduler_options={"dashboard_address": None, "host": "127.0.0.1"},
    ) as cluster:
        watch = QueueWatch("DaskWorkerName =!= undefined", JOBS)
        started = time.time()
        cluster.scale(jobs=JOBS)
        return watch.when() - started
