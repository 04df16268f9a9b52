"""Dask's way to a scheduler behind a Dask Gateway proxy, for workers whose environment has no dask_gateway.

An address is ``gateway://HOST:PORT/CLUSTER``; the proxy at HOST:PORT routes by TLS SNI, as dask_gateway's own comm does
(`dask_gateway/comm.py`). With the scheme registered, everything in a task that connects to the scheduler by address
(`get_client`, `worker_client`, `Client(address)`) finds its way too.
"""

from __future__ import annotations

from typing import Any

from distributed.comm.registry import backends
from distributed.comm.tcp import TLSBackend, TLSConnector

SCHEME = "gateway"


def gateway_address(proxy: str, cluster_name: str) -> str:
    """Address of a gateway cluster's scheduler through the proxy at ``host:port``."""
    return f"{SCHEME}://{proxy}/{cluster_name}"


def _host_port(location: str) -> str:
    return location.partition("/")[0]


class GatewayConnector(TLSConnector):
    """Connects to a gateway's proxy, naming the cluster by SNI."""

    async def connect(self, address: str, deserialize: bool = True, **connection_args: Any) -> Any:
        """Open a comm to the scheduler at ``HOST:PORT/CLUSTER``."""
        host_port, _, name = address.partition("/")
        connection_args["server_hostname"] = f"daskgateway-{name}"
        return await super().connect(host_port, deserialize, **connection_args)


class GatewayBackend(TLSBackend):
    """The ``gateway://`` scheme; it connects only, a scheduler itself listens on plain TLS."""

    def get_connector(self) -> GatewayConnector:
        return GatewayConnector()

    def get_listener(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("gateway:// addresses cannot be listened at")

    def get_address_host(self, loc: str) -> Any:
        return super().get_address_host(_host_port(loc))

    def get_address_host_port(self, loc: str) -> Any:
        return super().get_address_host_port(_host_port(loc))

    def resolve_address(self, loc: str) -> Any:
        host_port, _, name = loc.partition("/")
        return f"{super().resolve_address(host_port)}/{name}"

    def get_local_address_for(self, loc: str) -> Any:
        return super().get_local_address_for(_host_port(loc))


def register() -> None:
    """Make ``gateway://`` addresses known to distributed in this process, unless dask_gateway has."""
    if SCHEME not in backends:
        backends[SCHEME] = GatewayBackend()
