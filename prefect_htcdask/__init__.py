"""Prefect flows on HTCondor workers behind a Dask Gateway."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect_htcdask.blocks import HTCDaskCondorCredentials, HTCDaskGatewayCredentials
    from prefect_htcdask.cleanup.hooks import remove_leftover_jobs, with_cleanup
    from prefect_htcdask.errors import (
        HTCDaskError,
        RemoteTaskError,
        UnknownWorkerGroupError,
        UnpicklableResultError,
    )
    from prefect_htcdask.gateway.client import HTCGateway, HTCGatewayCluster
    from prefect_htcdask.runner.dask_clients import get_async_dask_client, get_dask_client
    from prefect_htcdask.runner.submit.worker_groups import worker_group
    from prefect_htcdask.runner.task_runner import HTCDaskTaskRunner
    from prefect_htcdask.settings import HTCDaskSettings

__version__ = "0.1.0"
"""Compared with the workers', whose copy of this package has no metadata of a distribution beside it."""

_HOMES = {
    "HTCDaskCondorCredentials": "blocks",
    "HTCDaskError": "errors",
    "HTCDaskGatewayCredentials": "blocks",
    "HTCDaskSettings": "settings",
    "HTCDaskTaskRunner": "runner.task_runner",
    "HTCGateway": "gateway",
    "HTCGatewayCluster": "gateway",
    "RemoteTaskError": "errors",
    "UnknownWorkerGroupError": "errors",
    "UnpicklableResultError": "errors",
    "get_async_dask_client": "runner.dask_clients",
    "get_dask_client": "runner.dask_clients",
    "remove_leftover_jobs": "cleanup",
    "with_cleanup": "cleanup",
    "worker_group": "runner.submit.worker_groups",
}

__all__ = [
    "HTCDaskCondorCredentials",
    "HTCDaskError",
    "HTCDaskGatewayCredentials",
    "HTCDaskSettings",
    "HTCDaskTaskRunner",
    "HTCGateway",
    "HTCGatewayCluster",
    "RemoteTaskError",
    "UnknownWorkerGroupError",
    "UnpicklableResultError",
    "get_async_dask_client",
    "get_dask_client",
    "remove_leftover_jobs",
    "with_cleanup",
    "worker_group",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: a worker or the command line needs few of them."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
