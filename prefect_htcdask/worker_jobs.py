"""This user's worker jobs in the queue, whichever flow run or cluster they belong to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import classad2

from prefect_htcdask.condor.worker_job import API_ATTRIBUTE, CLUSTER_ATTRIBUTE, FLOW_RUN_ATTRIBUTE
from prefect_htcdask.resolution import Parts
from prefect_htcdask.supervisor import oneshot

STATES = {1: "idle", 2: "running", 3: "removed", 4: "completed", 5: "held", 6: "running", 7: "suspended"}

_PROJECTION = [
    "ClusterId",
    "ProcId",
    "JobStatus",
    "RemoteHost",
    "QDate",
    "JobCurrentStartDate",
    "HoldReason",
    "JobBatchName",
    "HTCDaskAttempt",
    "HTCDaskWorkerGroup",
    "HTCDaskLeaseExpires",
    CLUSTER_ATTRIBUTE,
    FLOW_RUN_ATTRIBUTE,
    API_ATTRIBUTE,
]


@dataclass(frozen=True)
class WorkerJob:
    """One worker job in the queue.

    Times are Unix times in seconds; `flow_run_id` is empty outside a flow, and `api` where the job does not say which
    Prefect API knows its flow run.
    """

    job_id: str
    state: str
    host: str
    submitted: float
    started: float | None
    hold_reason: str
    batch_name: str
    cluster: str
    group: str
    flow_run_id: str
    attempt: int
    lease_expires: float
    api: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def worker_jobs(parts: Parts, flow_run_id: str | None = None) -> list[WorkerJob]:
    """The user's worker jobs, oldest first; of one flow run, if given.

    Raises:
        SupervisorError: the schedd could not be asked; the message names the setting and the remedy.
    """
    user = oneshot.call(parts.schedd, "user")
    constraint = f"{CLUSTER_ATTRIBUTE} =!= undefined && User == {classad2.quote(user)}"
    if flow_run_id is not None:
        constraint += f" && {FLOW_RUN_ATTRIBUTE} == {classad2.quote(flow_run_id)}"
    ads = oneshot.call(parts.schedd, "query", constraint, _PROJECTION)
    return [_worker_job(ad) for ad in sorted(ads, key=lambda ad: (ad["ClusterId"], ad["ProcId"]))]


def _worker_job(ad: dict[str, Any]) -> WorkerJob:
    running = STATES.get(ad["JobStatus"]) == "running"
    return WorkerJob(
        job_id=f"{ad['ClusterId']}.{ad['ProcId']}",
        state=STATES.get(ad["JobStatus"], "unknown"),
        host=str(ad.get("RemoteHost") or ""),
        submitted=float(ad.get("QDate") or 0),
        started=float(ad["JobCurrentStartDate"]) if running and ad.get("JobCurrentStartDate") else None,
        hold_reason=str(ad.get("HoldReason") or "") if STATES.get(ad["JobStatus"]) == "held" else "",
        batch_name=str(ad.get("JobBatchName") or ""),
        cluster=str(ad.get(CLUSTER_ATTRIBUTE) or ""),
        group=str(ad.get("HTCDaskWorkerGroup") or ""),
        flow_run_id=str(ad.get(FLOW_RUN_ATTRIBUTE) or ""),
        attempt=int(ad.get("HTCDaskAttempt") or 1),
        lease_expires=float(ad.get("HTCDaskLeaseExpires") or 0),
        api=str(ad.get(API_ATTRIBUTE) or ""),
    )
