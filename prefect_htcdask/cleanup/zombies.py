"""Flow runs that Prefect takes for alive, though nothing that could end them is left.

Their process was killed, and no Prefect process stood beside it to say so. What is ended here was started with our task
runner, or within a flow run that was: a job or a run directory says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, StateType

from prefect_htcdask.cleanup.orphans import ended_at
from prefect_htcdask.cleanup.ownership import Liveness
from prefect_htcdask.cleanup.prefect_runs import read_subflow_runs, with_parents

GRACE = 600.0
"""Seconds without a sign of life, until what is known by its absence alone is believed."""

_ALIVE = (StateType.RUNNING, StateType.CANCELLING)
_BEGUN = (*_ALIVE, StateType.PENDING)
_MOST_LEVELS = 20

_NO_PROCESS = "its process is gone"


@dataclass(frozen=True)
class ZombieFlowRun:
    """A flow run that nothing ends any more, and why that is known, as a clause."""

    flow_run: FlowRun
    why: str


def find_zombies(
    client: SyncPrefectClient, flow_runs: Mapping[str, FlowRun], signs: Liveness, now: float
) -> dict[str, ZombieFlowRun]:
    """Those of the flow runs, and of the subflow runs within them, that are abandoned, by their ids.

    Args:
        client: the Prefect API.
        flow_runs: flow runs that jobs or run directories tell of.
        signs: what tells whether their processes live.
        now: Unix time in seconds.
    """
    found: dict[str, ZombieFlowRun] = {}
    for key, run in flow_runs.items():
        if why := zombie_reason(run, signs, now):
            found[key] = ZombieFlowRun(run, why)
    over = [key for key, run in flow_runs.items() if key in found or ended_at(run) is not None]
    # Those that are ours within a flow run that is not; then those within ours, and those within these.
    candidates = [run for key, run in flow_runs.items() if key not in found]
    candidates += read_subflow_runs(client, over, _BEGUN)
    for _ in range(_MOST_LEVELS):
        fresh = {}
        for run, parent in with_parents(client, filter(runs_within_its_parent, candidates)):
            why = zombie_reason_with(parent, found.get(str(parent.id)), run, signs, now)
            if why and str(run.id) not in found:
                fresh[str(run.id)] = ZombieFlowRun(run, why)
        if not fresh:
            break
        found |= fresh
        candidates = read_subflow_runs(client, fresh, _BEGUN)
    return found


def zombie_reason(flow_run: FlowRun, signs: Liveness, now: float) -> str:
    """Why a flow run of ours is abandoned, as a clause; empty where it is not, or may not be.

    A process that is told to cancel ends within a minute. One that has neither ended nor renewed its lease for much
    longer, is gone, though it ran on another host, and what was wanted of it was its end.
    """
    if flow_run.state_type not in _ALIVE:
        return ""
    key = str(flow_run.id)
    if signs.process_is_dead(key, flow_run.run_count or 1):
        return _NO_PROCESS
    if flow_run.state_type != StateType.CANCELLING or signs.process_is_alive(key) or signs.lease_valid(key):
        return ""
    asked = flow_run.state.timestamp.timestamp() if flow_run.state else now
    return f"it was to be cancelled {(now - asked) / 60:.0f} minutes ago" if now - asked > GRACE else ""


def zombie_reason_with(
    parent: FlowRun, abandoned: ZombieFlowRun | None, flow_run: FlowRun, signs: Liveness, now: float
) -> str:
    """Why a subflow run is abandoned with the flow run that it is part of, as a clause; empty where it is not.

    It runs in its parent's process. Where that is known to be dead, so is it. Where that is not known, a parent that is
    Crashed or Cancelled for long is believed; one that is Completed or Failed may have left it to a thread that lives.

    Args:
        parent: the flow run that it is part of.
        abandoned: that its parent is abandoned itself, or `None`.
        flow_run: the subflow run.
        signs: what tells whether their processes live.
        now: Unix time in seconds.
    """
    key, parent_key = str(flow_run.id), str(parent.id)
    if not runs_within_its_parent(flow_run) or signs.process_is_alive(key) or signs.process_is_alive(parent_key):
        return ""
    if abandoned is not None:
        return f"the flow run that it is part of is abandoned: {abandoned.why}"
    ended = ended_at(parent)
    if ended is None:
        return ""
    why = f"the flow run that it is part of is {parent.state.name if parent.state else ''}"
    if signs.process_is_dead(parent_key):
        return why
    for_long = now - ended > GRACE and not signs.lease_valid(key) and not signs.lease_valid(parent_key)
    return why if for_long and parent.state_type in (StateType.CRASHED, StateType.CANCELLED) else ""


def runs_within_its_parent(flow_run: FlowRun) -> bool:
    """Whether it is a subflow run in its parent's process, that has begun and not ended.

    One that was started as a run of a deployment, or given to a work pool, has a process of its own, and outlives its
    parent.
    """
    elsewhere = (flow_run.deployment_id, flow_run.work_pool_name, flow_run.work_queue_name, flow_run.infrastructure_pid)
    return flow_run.parent_task_run_id is not None and not any(elsewhere) and flow_run.state_type in _BEGUN
