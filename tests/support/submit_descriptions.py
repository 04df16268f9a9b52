"""Submit descriptions to look at."""

from __future__ import annotations

from typing import Any

from prefect_htcdask.condor.submit_description import (
    FlowRunTag,
    JobFiles,
    WorkerSpec,
    submit_description,
)

FILES = JobFiles("/run", "start.py", ("/run/a", "/run/b"), ("b",), "/run/jobs.log")


def describe(**changes: Any) -> dict[str, str]:
    spec = WorkerSpec(**{"python": "/usr/bin/python3", **changes.pop("spec", {})})
    arguments: dict[str, Any] = {
        "cluster_name": "c0ffee",
        "group": "default",
        "flow_run": FlowRunTag("0-1", "run", "flow", 2),
        "lease_expires": 1234,
        "lost_schedd_lease": 600.0,
    }
    return submit_description(spec, changes.pop("files", FILES), **{**arguments, **changes})
