"""Jobs that are vacated, as condor_vacate_job does it."""

from __future__ import annotations

from typing import Any

import htcondor2

from prefect_htcdask.condor.schedd import ScheddClient
from prefect_htcdask.worker.names import job_of_worker


def vacate(queue: ScheddClient, worker: str, action: Any = htcondor2.JobAction.Vacate) -> str:
    """Evict the job of a worker, as condor_vacate_job does; returns the job's id."""
    job = job_of_worker(worker)
    assert job is not None
    assert queue.locate().act(action, [job])["TotalSuccess"] == 1
    return job
