"""A drop-in for dask_gateway: its client and cluster, where gateway and pool are, what a supervisor is given."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dask_gateway import GatewayClusterError

    from prefect_htcdask.condor.submit_description import WorkerJobError
    from prefect_htcdask.gateway.checks import GatewayUnreachable
    from prefect_htcdask.gateway.client import HTCGateway
    from prefect_htcdask.gateway.cluster import HTCGatewayCluster
    from prefect_htcdask.supervisor.client import SupervisorError

_HOMES = {
    "GatewayClusterError": "dask_gateway",
    "GatewayUnreachable": "prefect_htcdask.gateway.checks",
    "HTCGateway": "prefect_htcdask.gateway.client",
    "HTCGatewayCluster": "prefect_htcdask.gateway.cluster",
    "SupervisorError": "prefect_htcdask.supervisor.client",
    "WorkerJobError": "prefect_htcdask.condor.submit_description",
}

__all__ = [
    "GatewayClusterError",
    "GatewayUnreachable",
    "HTCGateway",
    "HTCGatewayCluster",
    "SupervisorError",
    "WorkerJobError",
]


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: a sweep reads run directories, and needs no client of a gateway."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
