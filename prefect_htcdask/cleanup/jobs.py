"""This user's worker jobs, whichever flow run or cluster they belong to, and why those do not run that should."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from typing import Any

from prefect_htcdask.condor.diagnosis import Category, diagnose_hold
from prefect_htcdask.condor.event_times import SERVER_TIME, by_our_clock, seconds_ahead
from prefect_htcdask.condor.job_codes import JobState, state_of
from prefect_htcdask.condor.submit_description import (
    API_ATTRIBUTE,
    CLUSTER_ATTRIBUTE,
    FLOW_RUN_ATTRIBUTE,
    GROUP_ATTRIBUTE,
    flow_run_constraint,
    group_constraint,
)
from prefect_htcdask.gateway.endpoints import Endpoints
from prefect_htcdask.gateway.run_directory import cluster_traces, failures_in, run_directory
from prefect_htcdask.scheduler.task_kinds import DEFAULT_GROUP
from prefect_htcdask.settings import HTCDaskSettings
from prefect_htcdask.supervisor import oneshot

_PROJECTION = [
    "ClusterId",
    "ProcId",
    "JobStatus",
    "RemoteHost",
    "QDate",
    "JobCurrentStartDate",
    "HoldReason",
    "HoldReasonCode",
    "HoldReasonSubCode",
    "JobBatchName",
    "HTCDaskAttempt",
    GROUP_ATTRIBUTE,
    "HTCDaskLeaseExpires",
    SERVER_TIME,
    CLUSTER_ATTRIBUTE,
    FLOW_RUN_ATTRIBUTE,
    API_ATTRIBUTE,
]


FAILED = "failed"
"""State of a job that is no more: its worker died, or HTCondor held it and another took its place."""

_WELL = frozenset({"", Category.WAITING.value, Category.POOL_FULL.value, Category.LOW_PRIORITY.value})


@dataclass(frozen=True)
class WorkerJob:
    """One worker job, in the queue unless its state is ``failed``.

    Times are Unix times in seconds, `started` and `lease_expires` by this host's clock; `cluster` is the digest of its
    gateway cluster's name (`cluster_digest`), also the name of the run directory; `flow_run_id` is empty outside of a
    flow, and `api` where the job does not say which Prefect API knows its flow run. `category` (a value of `Category`),
    `summary` and `remedy` tell why it does not run, and are empty where nothing is wrong or it was not asked for.
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
    ended: float | None = None
    category: str = ""
    summary: str = ""
    remedy: str = ""

    @property
    def is_well(self) -> bool:
        """Whether it runs, or needs but time to."""
        return self.category in _WELL

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def worker_jobs(parts: Endpoints, flow_run_id: str | None = None) -> list[WorkerJob]:
    """The user's worker jobs, oldest first; of one flow run, if given.

    Raises:
        SupervisorError: the schedd could not be asked; the message names the setting and the remedy.
    """
    condition = f"{CLUSTER_ATTRIBUTE} =!= undefined"
    if flow_run_id is not None:
        condition += f" && {flow_run_constraint(flow_run_id)}"
    asked = time.time()
    ads = oneshot.call(parts.schedd, "query", condition, _PROJECTION)
    ahead = seconds_ahead(float(ads[0][SERVER_TIME]), asked, time.time()) if ads and ads[0].get(SERVER_TIME) else 0.0
    ours = (by_our_clock(ad, ahead) for ad in sorted(ads, key=lambda ad: (ad["ClusterId"], ad["ProcId"])))
    return [_worker_job(ad) for ad in ours]


def explained_jobs(parts: Endpoints, settings: HTCDaskSettings, flow_run_id: str | None = None) -> list[WorkerJob]:
    """The user's worker jobs, oldest first, each with why it does not run, if it should.

    Beside those in the queue, those that failed in the same clusters are told of; of a flow run that is given, also
    where it is over.

    Raises:
        SupervisorError: schedd or collector could not be asked; the message names the setting and the remedy.
    """
    jobs = worker_jobs(parts, flow_run_id)
    failed = failed_jobs(settings, {job.cluster for job in jobs}, flow_run_id)
    # One that was held may be in the queue yet, or again.
    all_jobs = {job.job_id: job for job in (*failed, *_with_reasons(parts, jobs))}
    return sorted(all_jobs.values(), key=lambda job: tuple(map(int, job.job_id.split("."))))


def _with_reasons(parts: Endpoints, jobs: list[WorkerJob]) -> list[WorkerJob]:
    """Ask HTCondor why idle jobs wait: one of each cluster's groups stands for the others."""
    groups: defaultdict[str, set[str]] = defaultdict(set)
    idle: defaultdict[tuple[str, str], int] = defaultdict(int)
    for job in jobs:
        groups[job.cluster].add(job.group)
        if job.state == "idle":
            idle[job.cluster, job.group] += 1
    questions = [
        (group_constraint(cluster, group), count, _settings_of(group, groups[cluster]))
        for (cluster, group), count in idle.items()
    ]
    answers = oneshot.call(parts.schedd, "explain", questions) if questions else []
    found = {kind: answer for kind, answer in zip(idle, answers, strict=True) if answer is not None}
    return [
        replace(job, **found[kind]) if job.state == "idle" and (kind := (job.cluster, job.group)) in found else job
        for job in jobs
    ]


def failed_jobs(settings: HTCDaskSettings, clusters: set[str], flow_run_id: str | None = None) -> list[WorkerJob]:
    """Jobs that failed, as their supervisors wrote them down: of some clusters, and of a flow run that is given."""
    failed = []
    for trace in cluster_traces(settings, since=0):
        record = trace.record
        of_flow_run = record is not None and record.flow_run_id == flow_run_id
        if trace.cluster not in clusters and not of_flow_run:
            continue
        for told in failures_in(run_directory(settings, trace.cluster)):
            failed.append(
                WorkerJob(
                    job_id=str(told["job_id"]),
                    state=FAILED,
                    host=str(told.get("host") or ""),
                    submitted=float(told.get("submitted") or 0),
                    started=told.get("started"),
                    hold_reason=str(told.get("hold_reason") or ""),
                    batch_name=record.flow_run_name if record else trace.cluster,
                    cluster=trace.cluster,
                    group=str(told.get("group") or ""),
                    flow_run_id=record.flow_run_id if record else "",
                    attempt=record.attempt if record else 1,
                    lease_expires=0.0,
                    api=record.api_url if record else "",
                    ended=told.get("time"),
                    category=str(told.get("category") or ""),
                    summary=str(told.get("summary") or ""),
                    remedy=str(told.get("remedy") or ""),
                )
            )
    return failed


def reasons(jobs: list[WorkerJob]) -> list[str]:
    """A line for each reason why jobs do not run, with the jobs that share it."""
    sharing: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for job in jobs:
        if job.category:
            sharing[job.category, job.summary, job.remedy].append(job.job_id)
    return [
        f"{', '.join(ids[:3])}{f' and {len(ids) - 3} more' if len(ids) > 3 else ''}: {category}: {summary}"
        + (f" -> {remedy}" if remedy else "")
        for (category, summary, remedy), ids in sharing.items()
    ]


def _settings_of(group: str, groups: set[str]) -> str:
    """Where the settings of a worker group stand, as far as the cluster's jobs tell."""
    return "worker" if groups <= {DEFAULT_GROUP} else f"workers.{group}"


def _worker_job(ad: dict[str, Any]) -> WorkerJob:
    code, subcode = (int(ad.get(name) or 0) for name in ("HoldReasonCode", "HoldReasonSubCode"))
    state, held = state_of(ad["JobStatus"], code), None
    running = state is JobState.RUNNING
    if state is JobState.HELD:
        group = str(ad.get(GROUP_ATTRIBUTE) or DEFAULT_GROUP)
        held = diagnose_hold(code, subcode, str(ad.get("HoldReason") or ""), _settings_of(group, {group}))
    return WorkerJob(
        job_id=f"{ad['ClusterId']}.{ad['ProcId']}",
        state=state.value,
        host=str(ad.get("RemoteHost") or ""),
        submitted=float(ad.get("QDate") or 0),
        started=float(ad["JobCurrentStartDate"]) if running and ad.get("JobCurrentStartDate") else None,
        hold_reason=str(ad.get("HoldReason") or "") if held else "",
        batch_name=str(ad.get("JobBatchName") or ""),
        cluster=str(ad.get(CLUSTER_ATTRIBUTE) or ""),
        group=str(ad.get(GROUP_ATTRIBUTE) or ""),
        flow_run_id=str(ad.get(FLOW_RUN_ATTRIBUTE) or ""),
        attempt=int(ad.get("HTCDaskAttempt") or 1),
        lease_expires=float(ad.get("HTCDaskLeaseExpires") or 0),
        api=str(ad.get(API_ATTRIBUTE) or ""),
        category=held.category.value if held else "",
        summary=held.summary if held else "",
        remedy=held.remedy if held else "",
    )
