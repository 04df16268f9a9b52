"""The sweep: removes worker jobs and gateway clusters whose flow run is over, unknown, or superseded by a retry.

The last layer of cleanup, for what hosts and processes that died together may leave. It touches only the user's own:
jobs in the schedd's queue, and of the user's gateway clusters those that a job or a run directory names. Task runs that
such a flow run left unfinished are moved to Crashed, and so is a flow run itself whose process is known to be gone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from prefect.client.base import ServerType
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, StateType, TaskRun

from prefect_htcdask.cleanup.jobs import WorkerJob, worker_jobs
from prefect_htcdask.cleanup.orphans import Orphan, ended_at, find_orphans
from prefect_htcdask.cleanup.ownership import Liveness, owners_by_history
from prefect_htcdask.cleanup.prefect_runs import end_flow_run, end_task_runs, read_flow_runs, unfinished_task_runs
from prefect_htcdask.cleanup.remove import GATEWAY_ERRORS, running_clusters, stop_clusters
from prefect_htcdask.cleanup.zombies import ZombieFlowRun, find_zombies
from prefect_htcdask.condor.submit_description import cluster_digest, flow_run_constraint
from prefect_htcdask.gateway.client import HTCGateway
from prefect_htcdask.gateway.endpoints import Endpoints, resolve_running_endpoints
from prefect_htcdask.gateway.run_directory import ClusterRecord, ClusterTrace, cluster_traces
from prefect_htcdask.settings import HTCDaskSettings
from prefect_htcdask.supervisor import oneshot
from prefect_htcdask.supervisor.client import SupervisorError
from prefect_htcdask.utils.api_identity import current_api
from prefect_htcdask.utils.prefect_client import prefect_api

WINDOW = 7 * 86400.0
"""Seconds: flow runs that ended longer ago are not looked at for unfinished task runs."""

_SETTLE = 30.0
"""Seconds in which a flow's process, or its workers' last events, may still tell how a task run ended."""

_SPEAK_FIRST = 10.0
_GONE_TIMEOUT = 60.0
_PAUSE = 1.0


@dataclass(frozen=True)
class Skipped:
    """What is there of a flow run that is over or unknown, and was left alone, and why."""

    flow_run_id: str
    why: str


@dataclass
class OtherAPI:
    """What is there of flow runs that another Prefect API knows, by its name: that one's sweep removes it.

    Attributes:
        api: the API.
        flow_run_ids: the flow runs.
        jobs: how many jobs of theirs are in the queue.
        clusters: how many of their gateway clusters run.
    """

    api: str
    flow_run_ids: list[str] = field(default_factory=list)
    jobs: int = 0
    clusters: int = 0

    def describe(self) -> str:
        """One line that says what was spared, and what to do about it."""
        return (
            f"{self.jobs} jobs and {self.clusters} gateway clusters belong to {len(self.flow_run_ids)} flow runs of "
            f"the Prefect API at {self.api}; sweep with that API's settings"
        )


@dataclass
class Swept:
    """What a sweep found, and what it removed; nothing in a dry run.

    Attributes:
        leftovers: jobs and gateway clusters that nobody needs any more.
        abandoned: why flow runs are taken for gone that Prefect has as Running or Cancelling, by their ids.
        unfinished_task_runs: how many task runs are unfinished under a flow run that is over, by its id.
        kept: what was left alone though its flow run is over or unknown, for a reason that passes.
        other_apis: what belongs to flow runs that this API does not know, but another one.
        jobs_removed: how many jobs the schedd was asked to remove.
        clusters_stopped: names of the gateway clusters that were stopped.
        flow_runs_ended: how many flow runs were moved to Crashed or Cancelled: those abandoned.
        task_runs_ended: how many task runs were moved to Crashed.
        problems: what was in the way; the exit status of the command is 0 only where there is none.
        dry_run: whether nothing was removed by intent.
    """

    leftovers: list[Orphan] = field(default_factory=list)
    abandoned: dict[str, str] = field(default_factory=dict)
    unfinished_task_runs: dict[str, int] = field(default_factory=dict)
    kept: list[Skipped] = field(default_factory=list)
    other_apis: list[OtherAPI] = field(default_factory=list)
    jobs_removed: int = 0
    clusters_stopped: list[str] = field(default_factory=list)
    flow_runs_ended: int = 0
    task_runs_ended: int = 0
    problems: list[str] = field(default_factory=list)
    dry_run: bool = False

    @property
    def found(self) -> bool:
        """Whether anything is or was left over."""
        return bool(self.leftovers or self.abandoned or self.unfinished_task_runs)

    @property
    def all_is_well(self) -> bool:
        """Whether nothing is left over now, as far as this sweep can tell."""
        return not self.problems and not (self.dry_run and self.found)

    def lines(self) -> list[str]:
        """What was found and done, for people to read; the problems are not among it."""
        lines = [one.describe(self.dry_run) for one in self.leftovers]
        verb = "would be moved" if self.dry_run else "to be moved"
        lines += [f"flow run {one} {verb} to Crashed or Cancelled: {why}" for one, why in self.abandoned.items()]
        lines += [
            f"flow run {flow_run_id}: {count} unfinished task runs {verb} to Crashed"
            for flow_run_id, count in self.unfinished_task_runs.items()
        ]
        lines += [f"flow run {one.flow_run_id} is left alone: {one.why}" for one in self.kept]
        lines += [other.describe() for other in self.other_apis]
        if not self.found:
            lines.append("nothing is left over")
        elif not self.dry_run:
            lines.append(
                f"{self.jobs_removed} jobs removed, {len(self.clusters_stopped)} gateway clusters stopped, "
                f"{self.flow_runs_ended} flow runs and {self.task_runs_ended} task runs ended"
            )
        return lines


def sweep(settings: HTCDaskSettings, dry_run: bool = False, window: float = WINDOW) -> Swept:
    """Find what is left over, and remove it. Sweeps in parallel do each other no harm.

    Args:
        settings: where gateway and schedd are.
        dry_run: only find it.
        window: seconds since the end of a flow run in which its task runs are looked at.

    Raises:
        SettingsError: a setting cannot work.
        SupervisorError: the schedd could not be asked.
        PrefectAPIError: the Prefect API could not be asked; nothing was removed that it had not judged before.
    """
    swept = Swept(dry_run=dry_run)
    now = time.time()
    parts = resolve_running_endpoints(settings)
    jobs = [job for job in worker_jobs(parts) if job.flow_run_id] if parts is not None else []
    traces = {trace.cluster: trace for trace in cluster_traces(settings, since=now - window)}
    running = _running_clusters(parts, swept)
    records = _records(parts, traces, running, jobs, now - window, swept)
    ids = {job.flow_run_id for job in jobs} | {record.flow_run_id for record in records}
    with prefect_api() as client:
        client.hello()
        flow_runs = read_flow_runs(client, ids)
        signs = Liveness(jobs, records, traces, settings.lease.duration, now)
        over = {key: run for key, run in flow_runs.items() if (at := ended_at(run)) is not None and at > now - window}
        abandoned = find_zombies(client, flow_runs, signs, now)
        swept.abandoned = {key: one.why for key, one in sorted(abandoned.items())}
        over |= {key: one.flow_run for key, one in abandoned.items()}
        unfinished, complete = unfinished_task_runs(client, over)
        if not complete:
            swept.problems.append("there are more unfinished task runs than one sweep looks at; run it again")
        there_too = [record for record in records if record.cluster in running]
        there = {job.flow_run_id for job in jobs} | {record.flow_run_id for record in there_too}
        _keep_of_other_apis(client, there - flow_runs.keys(), signs, swept)
        _count(swept.other_apis, jobs, there_too)
        _keep_still_reporting(over, unfinished, signs, now, swept)
        kept = {one.flow_run_id for one in swept.kept}
        kept |= {flow_run_id for other in swept.other_apis for flow_run_id in other.flow_run_ids}
        swept.leftovers = find_orphans(jobs, flow_runs, there_too, records, kept, abandoned)
        lost = {key: task_runs for key, task_runs in unfinished.items() if key not in kept}
        swept.unfinished_task_runs = {key: len(task_runs) for key, task_runs in lost.items()}
        if not dry_run:
            if parts is not None:
                _remove(parts, swept)
            for spoken_for in _end_flow_runs(client, abandoned.values(), now, swept):
                lost.pop(spoken_for, None)
            _end_task_runs(client, parts, lost, over, swept)
    return swept


def _running_clusters(parts: Endpoints | None, swept: Swept) -> set[str]:
    """Digests of the names of this user's gateway clusters that run: what stands for them in ads and directories."""
    if parts is None:
        return set()
    try:
        with HTCGateway(parts=parts) as gateway:
            return {cluster_digest(name) for name in running_clusters(gateway)}
    except GATEWAY_ERRORS as exc:
        swept.problems.append(f"no gateway cluster was looked at: {exc or type(exc).__name__}")
        return set()


def _records(
    parts: Endpoints | None,
    traces: Mapping[str, ClusterTrace],
    running: set[str],
    jobs: Iterable[WorkerJob],
    since: float,
    swept: Swept,
) -> list[ClusterRecord]:
    """Whose each cluster is: by its run directory's record, by its jobs, else by the jobs that it once had."""
    records = [trace.record for trace in traces.values() if trace.record is not None]
    known = {record.cluster for record in records} | {job.cluster for job in jobs}
    unknown = [digest for digest in dict.fromkeys([*sorted(running), *traces]) if digest not in known]
    if parts is not None and unknown:
        try:
            records += owners_by_history(parts, unknown, since)
        except SupervisorError as exc:
            swept.problems.append(f"whose {len(unknown)} clusters are could not be told: {exc}")
    return records


def _keep_of_other_apis(client: SyncPrefectClient, unknown: Iterable[str], signs: Liveness, swept: Swept) -> None:
    """Leave flow runs alone that this API does not know because they belong to another one."""
    ours = current_api()
    others: dict[str, OtherAPI] = {}
    for flow_run_id in sorted(unknown):
        if other := signs.other_api(flow_run_id, ours):
            others.setdefault(other, OtherAPI(other)).flow_run_ids.append(flow_run_id)
        elif client.server_type == ServerType.EPHEMERAL and not signs.belongs_to(flow_run_id, ours):
            swept.kept.append(
                Skipped(flow_run_id, "PREFECT_API_URL is not set, and Prefect's own database has none such")
            )
            swept.problems.append(f"which API knows flow run {flow_run_id} cannot be told: set PREFECT_API_URL")
    swept.other_apis = list(others.values())


def _count(others: Iterable[OtherAPI], jobs: Iterable[WorkerJob], clusters: Iterable[ClusterRecord]) -> None:
    mine = {flow_run_id: other for other in others for flow_run_id in other.flow_run_ids}
    for job in jobs:
        if job.flow_run_id in mine:
            mine[job.flow_run_id].jobs += 1
    for record in clusters:
        if record.flow_run_id in mine:
            mine[record.flow_run_id].clusters += 1


def _keep_still_reporting(
    over: Mapping[str, FlowRun],
    unfinished: Mapping[str, list[TaskRun]],
    signs: Liveness,
    now: float,
    swept: Swept,
) -> None:
    """Leave flow runs alone whose process, or whose workers, may still say how their last task runs end.

    A flow run is Completed or Failed when its function has returned; its process then waits for the task runs that
    nobody awaited. One that is Crashed has no process any more.
    """
    for flow_run_id, task_runs in unfinished.items():
        flow_run = over[flow_run_id]
        if flow_run.state_type == StateType.CRASHED or signs.process_is_dead(flow_run_id):
            continue
        name = flow_run.state.name if flow_run.state else ""
        age = now - (ended_at(flow_run) or 0.0)
        if age < _SETTLE:
            swept.kept.append(
                Skipped(flow_run_id, f"{name} {age:.0f} s ago: {len(task_runs)} task runs may still report")
            )
        elif flow_run.state_type != StateType.CANCELLED and signs.lease_valid(flow_run_id):
            swept.kept.append(Skipped(flow_run_id, f"{name}, but its process may wait for {len(task_runs)} task runs"))


def _remove(parts: Endpoints, swept: Swept) -> None:
    if not swept.leftovers:
        return
    for leftover in swept.leftovers:
        if leftover.job_ids:
            constraint = flow_run_constraint(leftover.flow_run_id, leftover.before_attempt)
            reason = f"prefect_htcdask sweep: {leftover.why}"
            swept.jobs_removed += oneshot.call(parts.schedd, "remove", constraint, reason)
    digests = [digest for leftover in swept.leftovers for digest in leftover.clusters]
    swept.clusters_stopped, problems = stop_clusters(parts, digests)
    swept.problems += problems


def _end_flow_runs(
    client: SyncPrefectClient, abandoned: Iterable[ZombieFlowRun], seen: float, swept: Swept
) -> list[str]:
    """Move flow runs to a final state; returns the ids of those that have meanwhile got another one."""
    spoken_for = []
    for one in abandoned:
        # A Prefect process that supervises it is to speak first, and may mean to run it again.
        time.sleep(max(0.0, seen + _SPEAK_FIRST - time.time()))
        message = f"Ended by prefect_htcdask's sweep: the process of this flow run is gone ({one.why})"
        if end_flow_run(client, one.flow_run, message) is None:
            spoken_for.append(str(one.flow_run.id))
        else:
            swept.flow_runs_ended += 1
    return spoken_for


def _end_task_runs(
    client: SyncPrefectClient,
    parts: Endpoints | None,
    lost: Mapping[str, list[TaskRun]],
    over: Mapping[str, FlowRun],
    swept: Swept,
) -> None:
    """Move task runs to Crashed, once their workers are gone: a worker's last word on its task run counts more."""
    if not lost:
        return
    left = {one.flow_run_id for one in swept.leftovers if one.job_ids} & lost.keys()
    deadline = time.monotonic() + _GONE_TIMEOUT
    while parts is not None and left:
        left &= {job.flow_run_id for job in worker_jobs(parts)}
        if not left or time.monotonic() > deadline:
            break
        time.sleep(_PAUSE)
    for flow_run_id, task_runs in lost.items():
        if flow_run_id in left:
            swept.problems.append(
                f"jobs of flow run {flow_run_id} have not left the queue within {_GONE_TIMEOUT:.0f} s, so its "
                f"{len(task_runs)} unfinished task runs were left alone; run it again"
            )
            continue
        state = over[flow_run_id].state
        why = f"is {state.name}" if state is not None and state.is_final() else "has no process any more"
        swept.task_runs_ended += end_task_runs(
            client, task_runs, f"Ended by prefect_htcdask's sweep: its flow run {why}, and its worker is gone"
        )
