"""What a cluster's supervisor and scheduler get from the flow's process: the hand-off, and the plugin by value."""

from __future__ import annotations

import importlib
import os
import uuid
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cloudpickle
from dask_gateway import GatewayCluster

from prefect_htcdask.compat.dask_gateway import public_address
from prefect_htcdask.condor.address import ScheddAddress
from prefect_htcdask.condor.submit_description import FlowRunTag, WorkerSpec
from prefect_htcdask.gateway.checks import local_versions
from prefect_htcdask.gateway.run_directory import early_log, prune
from prefect_htcdask.scheduler import plugin as demand_module
from prefect_htcdask.scheduler import worker_loss
from prefect_htcdask.scheduler.pickle_by_value import pickled_by_value
from prefect_htcdask.settings import HTCDaskSettings
from prefect_htcdask.settings.report import ReportSettings
from prefect_htcdask.supervisor.client import SupervisorHandle
from prefect_htcdask.supervisor.policy import Target
from prefect_htcdask.supervisor.protocol import GatewayAccess, GroupPlan, Preflight, ReportPlan, SupervisorConfig
from prefect_htcdask.utils.net import is_loopback
from prefect_htcdask.worker.gateway_comm import gateway_address


def start_supervisor(
    settings: HTCDaskSettings,
    schedd: ScheddAddress,
    specs: Mapping[str, WorkerSpec],
    take_message: Callable[[dict[str, Any]], None],
) -> SupervisorHandle:
    """Start the process that will look after a cluster; it checks schedd and workers meanwhile.

    Args:
        settings: the settings.
        schedd: how to reach the schedd.
        specs: what one worker of each group is.
        take_message: a method that takes what the supervisor says, as long as its object lives.
    """
    logs = early_log(settings)
    prune(logs.parent, settings.condor.keep_logs, settings.lease.scheduler_duration)
    # The handle's reading thread must not keep a cluster alive that nobody else knows any more.
    taker = weakref.WeakMethod(take_message)

    def pass_on(message: dict[str, Any]) -> None:
        if (take := taker()) is not None:
            take(message)

    return SupervisorHandle(Preflight(schedd=schedd, groups=specs), logs, pass_on)


def scheduler_plugins(
    lease: float,
    offers: Mapping[str, Mapping[str, float]] | None = None,
    scheduler_lease: float | None = None,
) -> dict[str, bytes]:
    """The scheduler's plugins by name, pickled by value: the scheduler's image needs nothing of ours.

    Args:
        lease: seconds that a supervisor owns the cluster without a renewal.
        offers: the Dask resources that one worker of each group offers; `None`: one group that all tasks belong to.
        scheduler_lease: seconds that the cluster lives without one; `lease` by default.
    """
    modules = [worker_loss, *(importlib.import_module(name) for name in demand_module.BY_VALUE_MODULES)]
    plugins = worker_loss.WorkerLossPlugin(), demand_module.DemandPlugin(lease, offers, scheduler_lease)
    with pickled_by_value(modules):
        return {plugin.name: cloudpickle.dumps(plugin) for plugin in plugins}


def gateway_access(cluster: GatewayCluster) -> GatewayAccess:
    """How to reach a cluster's gateway and, once it runs, its scheduler."""
    gateway, security = cluster.gateway, cluster.security
    return GatewayAccess(
        address=gateway.address,
        proxy_address=gateway.proxy_address,
        public_address=public_address(gateway),
        auth=gateway.auth,
        cluster_name=cluster.name,
        scheduler_address=cluster.scheduler_address or "",
        tls_cert=security.tls_cert if security is not None else "",
        tls_key=security.tls_key if security is not None else "",
    )


def supervisor_config(
    cluster: GatewayCluster,
    *,
    specs: Mapping[str, WorkerSpec],
    settings: HTCDaskSettings,
    schedd: ScheddAddress,
    flow_run: FlowRunTag | None,
    worker_secrets: Mapping[str, str],
    run_directory: Path,
    fixed: int,
) -> SupervisorConfig:
    """All that a supervisor needs to look after a cluster that runs.

    Args:
        cluster: the cluster, connected.
        specs: what one worker of each group is.
        settings: the settings.
        schedd: how to reach the schedd.
        flow_run: the flow run that the workers belong to, if any.
        worker_secrets: environment variables for the worker processes alone.
        run_directory: where the cluster's files are.
        fixed: workers of the default group to start with.
    """
    groups = {
        name: GroupPlan(
            spec=spec,
            start_timeout=settings.groups[name].start_timeout,
            target=Target(fixed=fixed if name == next(iter(specs)) else 0),
        )
        for name, spec in specs.items()
    }
    gateway = cluster.gateway
    proxy = gateway.proxy_address.removeprefix("gateway://")
    return SupervisorConfig(
        owner=f"{os.uname().nodename}:{os.getpid()}:{uuid.uuid4().hex[:8]}",
        parent_pid=os.getpid(),
        access=gateway_access(cluster),
        schedd=schedd,
        groups=groups,
        worker_config={
            "scheduler_address": gateway_address(proxy, cluster.name),
            "host": "127.0.0.1" if is_loopback(proxy) else None,
            "preload": ["prefect_htcdask.worker.run_task"] if flow_run else [],
            "death_timeout": max(60.0, settings.lease.duration),
            "versions": local_versions(),
        },
        worker_secrets=worker_secrets,
        flow_run=flow_run,
        run_directory=str(run_directory),
        lease=settings.lease.duration,
        scheduler_lease=settings.lease.scheduler_duration,
        lost_schedd=settings.lease.lost_schedd,
        interval=settings.adaptive.interval,
        residence=settings.adaptive.residence,
        max_idle_jobs=settings.adaptive.max_idle_jobs,
        max_failures=settings.adaptive.max_failures,
        detached=not cluster.shutdown_on_close,
        report=_report_plan(settings.report) if flow_run else None,
    )


def _report_plan(report: ReportSettings) -> ReportPlan | None:
    return ReportPlan(report.interval, report.rows, report.picture) if report.enabled else None
