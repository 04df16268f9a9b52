"""Which worker jobs and gateway clusters nobody needs any more: from what there is, and what Prefect says of it.

Values in, values out: nothing here asks or removes anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from prefect.client.schemas.objects import FlowRun

from prefect_htcdask.cleanup.jobs import WorkerJob
from prefect_htcdask.gateway.run_directory import ClusterRecord


@dataclass(frozen=True)
class Orphan:
    """What is left of a flow run that nobody needs any more, and why.

    Attributes:
        flow_run_id: id of the flow run.
        batch_name: its name.
        before_attempt: only attempts before this one are left over; `None`: all.
        why: the reason, as a clause.
        job_ids: jobs in the queue.
        clusters: gateway clusters, those of the jobs and those that run without a job, by the digests of their names.
    """

    flow_run_id: str
    batch_name: str
    before_attempt: int | None
    why: str
    job_ids: tuple[str, ...]
    clusters: tuple[str, ...]

    def describe(self, dry_run: bool) -> str:
        """One line that says what is removed, or would be, and why."""
        first = f" ({self.job_ids[0]}…)" if self.job_ids else ""
        verb = "would be removed" if dry_run else "to be removed"
        return (
            f"{self.batch_name}: {len(self.job_ids)} jobs{first} and {len(self.clusters)} gateway clusters "
            f"{verb}: {self.why}"
        )


@dataclass
class _Signs:
    """What there is of one flow run."""

    name: str = ""
    jobs: list[WorkerJob] = field(default_factory=list)
    clusters: list[ClusterRecord] = field(default_factory=list)


def find_orphans(
    jobs: Iterable[WorkerJob],
    flow_runs: Mapping[str, FlowRun],
    clusters: Iterable[ClusterRecord] = (),
    records: Iterable[ClusterRecord] = (),
    kept: Iterable[str] = (),
    abandoned: Iterable[str] = (),
) -> list[Orphan]:
    """What nobody needs any more.

    Args:
        jobs: worker jobs of flow runs.
        flow_runs: those of the flow runs that the Prefect API knows, by id.
        clusters: gateway clusters of flow runs that run or start.
        records: what run directories say of any clusters: a job's ad that says otherwise is not believed.
        kept: ids of flow runs to be left alone.
        abandoned: ids of flow runs whose process is gone, though Prefect does not say that they are over.
    """
    signs: dict[str, _Signs] = {}
    for job in jobs:
        mine = signs.setdefault(job.flow_run_id, _Signs())
        mine.name = mine.name or job.batch_name
        mine.jobs.append(job)
    for record in clusters:
        mine = signs.setdefault(record.flow_run_id, _Signs())
        mine.name = mine.name or record.flow_run_name
        mine.clusters.append(record)
    spared, lost = set(kept), set(abandoned)
    told = {record.cluster: record for record in records}
    leftovers = []
    for flow_run_id, mine in signs.items():
        if flow_run_id in spared:
            continue
        why, before = orphan_reason(flow_runs.get(flow_run_id), flow_run_id in lost)
        over = [job for job in mine.jobs if before is None or job.attempt < before]
        names = {record.cluster for record in mine.clusters if before is None or record.attempt < before}
        names |= {job.cluster for job in over if job.cluster and _is_told_of(job, told.get(job.cluster))}
        if over or names:
            leftovers.append(
                Orphan(
                    flow_run_id=flow_run_id,
                    batch_name=mine.name,
                    before_attempt=before,
                    why=why,
                    job_ids=tuple(job.job_id for job in over),
                    clusters=tuple(sorted(names)),
                )
            )
    return leftovers


def _is_told_of(job: WorkerJob, record: ClusterRecord | None) -> bool:
    """Whether a job's cluster belongs to its flow run's attempt, as far as the cluster's own record says."""
    return record is None or (record.flow_run_id, record.attempt) == (job.flow_run_id, job.attempt)


def orphan_reason(flow_run: FlowRun | None, abandoned: bool = False) -> tuple[str, int | None]:
    """Why attempts of a flow run are over, and the first attempt that is not; `None` where all are.

    Args:
        flow_run: the flow run, or `None` where the Prefect API does not know it.
        abandoned: whether its process is known to be gone.
    """
    if flow_run is None:
        return "the Prefect API does not know its flow run", None
    if flow_run.state is None or flow_run.state.is_final():
        return f"its flow run is {flow_run.state.name if flow_run.state else 'without a state'}", None
    if abandoned:
        return "the process of its flow run is gone", None
    attempt = flow_run.run_count or 1
    return f"attempt {attempt} of its flow run has taken its place", attempt


def ended_at(flow_run: FlowRun) -> float | None:
    """When a flow run reached its final state, Unix time in seconds; `None` where it has not."""
    if flow_run.state is None or not flow_run.state.is_final():
        return None
    return flow_run.state.timestamp.timestamp()
