"""The sweep: removes worker jobs and gateway clusters whose flow run is over, unknown, or superseded by a retry.

The last layer of cleanup, for what hosts and processes that died together may leave. It touches only the user's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun

from prefect_htcdask.cleanup import stop_clusters
from prefect_htcdask.condor.worker_job import flow_run_constraint
from prefect_htcdask.resolution import resolve_running_parts
from prefect_htcdask.settings import HTCDaskSettings
from prefect_htcdask.supervisor import oneshot
from prefect_htcdask.worker_jobs import WorkerJob, worker_jobs

_PAGE = 100


@dataclass(frozen=True)
class Leftover:
    """Jobs of one flow run that nobody needs any more, and why."""

    flow_run_id: str
    batch_name: str
    before_attempt: int | None
    why: str
    job_ids: tuple[str, ...]
    clusters: tuple[str, ...]


@dataclass
class Swept:
    """What a sweep found, and what it removed; nothing in a dry run."""

    leftovers: list[Leftover] = field(default_factory=list)
    jobs_removed: int = 0
    clusters_stopped: list[str] = field(default_factory=list)
    dry_run: bool = False


def sweep(settings: HTCDaskSettings, dry_run: bool = False) -> Swept:
    """Find what is left over, and remove it.

    Args:
        settings: where gateway and schedd are.
        dry_run: only find it.

    Raises:
        SupervisorError: the schedd could not be asked.
        httpx.HTTPError: the Prefect API could not be asked; then nothing was removed.
    """
    swept = Swept(dry_run=dry_run)
    parts = resolve_running_parts(settings)
    if parts is None:
        return swept
    jobs = [job for job in worker_jobs(parts) if job.flow_run_id]
    swept.leftovers = find_leftovers(jobs, _flow_runs({job.flow_run_id for job in jobs}))
    if dry_run:
        return swept
    for leftover in swept.leftovers:
        constraint = flow_run_constraint(leftover.flow_run_id, leftover.before_attempt)
        swept.jobs_removed += oneshot.call(parts.schedd, "remove", constraint, f"prefect_htcdask sweep: {leftover.why}")
    names = sorted({name for leftover in swept.leftovers for name in leftover.clusters})
    if names:
        swept.clusters_stopped = stop_clusters(parts, names)
    return swept


def find_leftovers(jobs: Iterable[WorkerJob], flow_runs: Mapping[str, FlowRun]) -> list[Leftover]:
    """Which jobs nobody needs any more.

    Args:
        jobs: worker jobs of flow runs.
        flow_runs: those of their flow runs that the Prefect API knows, by id.
    """
    by_flow_run: dict[str, list[WorkerJob]] = {}
    for job in jobs:
        by_flow_run.setdefault(job.flow_run_id, []).append(job)
    leftovers = []
    for flow_run_id, members in by_flow_run.items():
        flow_run = flow_runs.get(flow_run_id)
        before: int | None = None
        if flow_run is None:
            why = "the Prefect API does not know its flow run"
        elif flow_run.state is None or flow_run.state.is_final():
            why = f"its flow run is {flow_run.state.name if flow_run.state else 'without a state'}"
        else:
            before = flow_run.run_count or 1
            members = [job for job in members if job.attempt < (before or 1)]
            why = f"attempt {before} of its flow run has taken its place"
        if members:
            leftovers.append(
                Leftover(
                    flow_run_id=flow_run_id,
                    batch_name=members[0].batch_name,
                    before_attempt=before,
                    why=why,
                    job_ids=tuple(job.job_id for job in members),
                    clusters=tuple(sorted({job.cluster for job in members})),
                )
            )
    return leftovers


def _flow_runs(ids: set[str]) -> dict[str, FlowRun]:
    found: dict[str, Any] = {}
    wanted = [UUID(text) for text in sorted(ids) if _is_uuid(text)]
    with get_client(sync_client=True) as client:
        for start in range(0, len(wanted), _PAGE):
            only = FlowRunFilter(id=FlowRunFilterId(any_=wanted[start : start + _PAGE]))
            found.update({str(flow_run.id): flow_run for flow_run in client.read_flow_runs(flow_run_filter=only)})
    return found


def _is_uuid(text: str) -> bool:
    try:
        UUID(text)
    except ValueError:
        return False
    return True
