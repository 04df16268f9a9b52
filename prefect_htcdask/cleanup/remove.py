"""Removes worker jobs and gateway clusters from outside of the process that they belong to."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import aiohttp
from dask_gateway import GatewayClusterError, GatewayServerError
from dask_gateway.auth import GatewayAuth
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound

from prefect_htcdask.cleanup.ownership import api_of
from prefect_htcdask.condor.submit_description import (
    API_ATTRIBUTE,
    CLUSTER_ATTRIBUTE,
    cluster_digest,
    flow_run_constraint,
)
from prefect_htcdask.embedded.errors import EmbeddedError
from prefect_htcdask.gateway.checks import ask_for_options
from prefect_htcdask.gateway.client import HTCGateway
from prefect_htcdask.gateway.endpoints import Endpoints, resolve_running_endpoints
from prefect_htcdask.gateway.run_directory import cluster_traces
from prefect_htcdask.settings import HTCDaskSettings, SettingsError, load_settings
from prefect_htcdask.supervisor import oneshot
from prefect_htcdask.supervisor.client import SupervisorError
from prefect_htcdask.utils.api_identity import current_api
from prefect_htcdask.utils.prefect_client import PrefectAPIError, prefect_api

if TYPE_CHECKING:
    from prefect import Flow

GATEWAY_ERRORS = (
    aiohttp.ClientError,
    asyncio.TimeoutError,
    OSError,
    ValueError,
    GatewayClusterError,
    GatewayServerError,
)
"""What dask_gateway's client raises where a gateway does not answer, or not as asked."""

_UNTOUCHABLE = (StateType.RUNNING, StateType.PAUSED)


@dataclass
class Removed:
    """What was removed, and what was in the way of more."""

    jobs: int = 0
    clusters: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def remove_after_flow_run(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> Removed:
    """Remove jobs and gateway clusters of those attempts of a flow run that are over.

    Args:
        flow: the flow; the settings of its task runner are used.
        flow_run: the flow run, as the caller last knew it.
        state: the state that it has reached.
    """
    try:
        settings, auth = _settings_of(flow)
        last, known = _last_attempt(flow_run)
        if last < 1:
            return Removed()
        parts = resolve_running_endpoints(settings)
    except (SettingsError, EmbeddedError) as exc:
        return Removed(problems=[str(exc)])
    if parts is None:
        return Removed()  # the embedded pool and gateway do not run, so nothing of them is left
    if auth is not None:
        parts = replace(parts, auth=auth)
    why = f"the flow run is {state.name}"
    return remove_attempts(settings, parts, str(flow_run.id), last, why, api="" if known else current_api())


def remove_attempts(
    settings: HTCDaskSettings, parts: Endpoints, flow_run_id: str, last: int, why: str, api: str = ""
) -> Removed:
    """Remove jobs and gateway clusters of a flow run's attempts up to the one numbered `last`.

    Args:
        settings: where the run directories are.
        parts: gateway and schedd.
        flow_run_id: the flow run.
        last: number of the last attempt that is over.
        why: the reason, for the job ads.
        api: spare what says that it belongs to another Prefect API than this (`current_api`); empty: nothing is spared.
    """
    removed = Removed()
    records = [trace.record for trace in cluster_traces(settings, since=0) if trace.record is not None]
    mine = [record for record in records if record.flow_run_id == flow_run_id and record.attempt <= last]
    # What a cluster's own record says of it, a job's ad does not change.
    not_mine = {record.cluster for record in records} - {record.cluster for record in mine}
    others = {record.cluster: api_of(record) for record in mine if api and api_of(record) not in ("", api)}
    digests = {record.cluster for record in mine}
    constraint = flow_run_constraint(flow_run_id, before_attempt=last + 1, api=api)
    try:
        jobs = oneshot.call(
            parts.schedd, "query", flow_run_constraint(flow_run_id, last + 1), [CLUSTER_ATTRIBUTE, API_ATTRIBUTE]
        )
        clusters = {str(job[CLUSTER_ATTRIBUTE]): str(job.get(API_ATTRIBUTE) or "") for job in jobs}
        digests |= clusters.keys() - not_mine
        others |= {cluster: named for cluster, named in clusters.items() if api and named not in ("", api)}
        if clusters.keys() - others.keys():
            removed.jobs = oneshot.call(parts.schedd, "remove", constraint, f"prefect_htcdask: {why}")
    except SupervisorError as exc:
        removed.problems.append(str(exc))
    if others:
        named = " and ".join(sorted(set(others.values())))
        removed.problems.append(
            f"the Prefect API at {api} does not know the flow run, and {len(others)} of its clusters belong to the one "
            f"at {named}: sweep with that API's settings"
        )
        digests -= others.keys()
    removed.clusters, problems = stop_clusters(parts, digests)
    removed.problems += [problem for problem in problems if problem not in removed.problems]
    return removed


def running_clusters(gateway: HTCGateway) -> list[str]:
    """Names of this user's gateway clusters that run or start.

    Raises:
        GatewayUnreachable: the gateway does not answer, or does not let us in.
    """
    gateway.sync(ask_for_options, gateway)
    return sorted(report.name for report in gateway.list_clusters())


def stop_clusters(parts: Endpoints, digests: Iterable[str]) -> tuple[list[str], list[str]]:
    """Stop gateway clusters, and remove the jobs that their supervisors may have submitted meanwhile.

    Args:
        parts: gateway and schedd.
        digests: digests of the clusters' names; which are this user's, and how they are called, the gateway says.

    Returns:
        the names of those that were there, and what was in the way of stopping others.
    """
    wanted = set(digests)
    stopped: list[str] = []
    problems: list[str] = []
    if not wanted:
        return stopped, problems
    try:
        with HTCGateway(parts=parts) as gateway:
            for name in running_clusters(gateway):
                if cluster_digest(name) not in wanted:
                    continue
                try:
                    gateway.stop_cluster(name)
                except ValueError:
                    continue  # dask_gateway's word for one that is gone: somebody else was faster
                except SupervisorError as exc:
                    problems.append(str(exc))
                stopped.append(name)
    except GATEWAY_ERRORS as exc:
        problems.append(str(exc) or type(exc).__name__)
    return stopped, list(dict.fromkeys(problems))


def _settings_of(flow: Flow[..., Any]) -> tuple[HTCDaskSettings, GatewayAuth | None]:
    """The settings that the flow's runs had, its task runner's own among them, and a login given as an object."""
    from prefect_htcdask.runner.task_runner import HTCDaskTaskRunner

    runner = flow.task_runner
    if not isinstance(runner, HTCDaskTaskRunner):
        return load_settings(), None
    settings = runner.effective_settings()
    given = {name: runner.cluster_kwargs.get(name) for name in ("address", "proxy_address", "public_address", "auth")}
    auth = given.pop("auth")
    login = auth if isinstance(auth, GatewayAuth) else None
    stated = {name: str(value) for name, value in given.items() if value is not None}
    if isinstance(auth, str):
        stated["auth"] = auth
    return settings.model_copy(update={"gateway": settings.gateway.model_copy(update=stated)}), login


def _last_attempt(flow_run: FlowRun) -> tuple[int, bool]:
    """The last attempt of a flow run that is over and has nobody to clean up after it; 0 where there is none.

    And whether the flow run is known to belong to the Prefect API of this process's settings, as far as it answers.

    The caller's copy may be older than the attempt that just ended, or it may be called when a next one has begun; so
    the API is asked. A flow run that it does not know has no later attempt. Where it does not answer, the copy has to
    do: it is never newer than what has ended.
    """
    from prefect_htcdask.runner import flow_run as sessions

    known = max(1, flow_run.run_count or 0)
    if sessions.find(str(flow_run.id)) is not None:
        # Prefect calls the hooks of a flow's own end before it leaves the task runner, which closes in order.
        return known - 1, True
    try:
        with prefect_api() as client:
            now = client.read_flow_run(flow_run.id)
    except PrefectAPIError:
        return known, True
    except ObjectNotFound:
        return known, False
    if now.state is not None and now.state.type in _UNTOUCHABLE:
        return (now.run_count or 1) - 1, True
    return max(known, now.run_count or 0), True
