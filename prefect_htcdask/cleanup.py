"""Removes what a flow run left behind, from outside its process: the flow hook.

It needs only the flow run's id and the settings, so it works from Prefect's own supervising process after the flow's
process is dead. The supervisor process and the leases cover a flow without hooks too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect.logging.loggers import flow_run_logger

from prefect_htcdask.condor.worker_job import CLUSTER_ATTRIBUTE, flow_run_constraint
from prefect_htcdask.resolution import Parts, resolve_running_parts
from prefect_htcdask.settings import load_settings
from prefect_htcdask.supervisor import oneshot

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.schemas.objects import FlowRun, State


def remove_leftover_jobs(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Remove the HTCondor jobs and gateway clusters of a flow run that is over; a hook for any of its ends.

    Use it as ``@flow(on_cancellation=[remove_leftover_jobs], on_crashed=[remove_leftover_jobs])``. Running twice, or
    twice at once, is harmless.

    Args:
        flow: the flow.
        flow_run: the flow run, of which only the id is used.
        state: its state.

    Raises:
        SettingsError: a setting cannot work.
        SupervisorError: the schedd could not be asked.
    """
    settings = load_settings()
    parts = resolve_running_parts(settings)
    if parts is None:
        return  # the embedded pool does not run, so nothing of it is left
    constraint = flow_run_constraint(str(flow_run.id))
    jobs = oneshot.call(parts.schedd, "query", constraint, [CLUSTER_ATTRIBUTE])
    if not jobs:
        return
    removed = oneshot.call(parts.schedd, "remove", constraint, f"prefect_htcdask: the flow run is {state.name}")
    clusters = sorted({str(job[CLUSTER_ATTRIBUTE]) for job in jobs if job.get(CLUSTER_ATTRIBUTE)})
    stopped = stop_clusters(parts, clusters)
    flow_run_logger(flow_run, flow).info(
        "Removed %d leftover HTCondor jobs and stopped %d leftover gateway clusters", removed, len(stopped)
    )


def stop_clusters(parts: Parts, names: list[str]) -> list[str]:
    """Stop gateway clusters; returns the names of those that were there."""
    from prefect_htcdask.gateway import HTCGateway

    stopped = []
    with HTCGateway(parts=parts) as gateway:
        running = {report.name for report in gateway.list_clusters()}
        for name in names:
            if name in running:
                gateway.stop_cluster(name)
                stopped.append(name)
    return stopped
