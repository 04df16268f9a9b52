"""Names of Dask workers that are HTCondor jobs: from a job and its start to the name, and back."""

from __future__ import annotations

import re


def worker_name(job_id: str, starts: int) -> str:
    """Dask's name for the worker of a job: new at each start of the job, since Dask takes no name twice."""
    return f"htcdask-{job_id}-{starts}"


def job_of_worker(name: object) -> str | None:
    """Id of the HTCondor job behind a Dask worker's name, or `None` for a worker that is not ours."""
    match = re.fullmatch(r"htcdask-(\d+\.\d+)-\d+", str(name))
    return match.group(1) if match else None
