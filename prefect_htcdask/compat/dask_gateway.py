"""dask_gateway's private names. Each function says what it stands in for; checked with dask-gateway 2026.3.

`gateway.cluster.HTCGatewayCluster` overrides `GatewayCluster._start_async`, `_stop_async` and `_stop_internal`: those
stay in the class.
"""

from __future__ import annotations

from typing import Any

from dask_gateway import Gateway


def use_class(gateway: Gateway, cls: type[Gateway]) -> None:
    """Make the client that a cluster object has made for itself one of another class.

    Stands in for: an argument of `dask_gateway.GatewayCluster` for the class of its `gateway`.
    """
    gateway.__class__ = cls


async def cluster_options(gateway: Gateway) -> Any:
    """The gateway's options, in its event loop.

    Stands in for: `dask_gateway.Gateway.cluster_options`, which makes a widget.
    """
    return await gateway._cluster_options()


async def submit(gateway: Gateway, options: Any, named: dict[str, Any]) -> str:
    """Have the gateway start a cluster, without waiting for its scheduler; returns the cluster's name.

    Stands in for: `dask_gateway.Gateway.submit`, in its event loop.
    """
    name: str = await gateway._submit(cluster_options=options, **named)
    return name


async def stop_cluster(gateway: Gateway, name: str) -> None:
    """Have the gateway stop a cluster.

    Stands in for: `dask_gateway.Gateway.stop_cluster`, in its event loop and in whatever class it was replaced.
    """
    await gateway._stop_cluster(name)


def public_address(gateway: Gateway) -> str:
    """Where users reach the gateway's pages."""
    address: str = gateway._public_address
    return address


def is_open(gateway: Gateway) -> bool:
    """Whether a client that its user calls synchronously is still to be closed.

    Stands in for: a public ``Gateway.status``.
    """
    return "_loop_runner" in gateway.__dict__ and not gateway.asynchronous


def forget_loop(gateway: Gateway) -> None:
    """Mark a synchronous client as closed: dask_gateway's `__del__` then leaves it alone."""
    gateway.__dict__.pop("_loop_runner", None)
