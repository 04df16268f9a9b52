"""Garbage collection of dask_gateway's objects, which close themselves when collected, waiting for their event loop.

The collector may run in that very loop's thread, and then the process waits for itself; and a client that was closed
stumbles over its stopped loop. Here, closing on collection has a thread of its own, and happens once.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

from dask_gateway import Gateway, GatewayClusterError

from prefect_htcdask.compat.dask_gateway import is_open
from prefect_htcdask.supervisor.gateway_http import CheckedGateway


class PrivateGateway(CheckedGateway):
    """The client inside a cluster object, which closes it."""

    def scale_cluster(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the gateway would start workers of its own."""
        raise GatewayClusterError("cluster.gateway scales no workers that are HTCondor jobs; use cluster.scale(n)")

    def adapt_cluster(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, as `scale_cluster`."""
        raise GatewayClusterError("cluster.gateway scales no workers that are HTCondor jobs; use cluster.adapt(...)")

    def new_cluster(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the cluster's workers would be the gateway's."""
        raise GatewayClusterError(
            "cluster.gateway makes no clusters of HTCondor workers; use HTCGateway().new_cluster()"
        )

    def connect(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, as `new_cluster`."""
        raise GatewayClusterError("cluster.gateway knows no HTCondor workers; use HTCGateway().connect(name)")

    def stop_cluster(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the cluster's jobs would stay."""
        raise GatewayClusterError(
            "cluster.gateway leaves a cluster's HTCondor jobs behind; use cluster.shutdown() or "
            "HTCGateway().stop_cluster(name)"
        )

    def __del__(self) -> None:
        """Nothing: a cluster and its client are collected together, in any order."""


def close_when_collected(thing: Any, gateway: Gateway | None) -> None:
    """What `__del__` of a cluster or client does: close it, if that is still to be done, off every event loop.

    Args:
        thing: the object that is collected, with a method `close`.
        gateway: its client, or `None` where it was never made.
    """
    if gateway is None or sys.is_finalizing() or not is_open(gateway):
        return
    threading.Thread(target=thing.close, name="htcdask-collected", daemon=True).start()
