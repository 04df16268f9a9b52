"""`HTCGateway` and `HTCGatewayCluster`: dask_gateway's client, with workers that are HTCondor jobs.

Any stock gateway will do: it gives the scheduler, and never starts a worker. Those belong to a supervisor process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dask_gateway import GatewayClusterError
from dask_gateway.auth import GatewayAuth

from prefect_htcdask.compat.dask_gateway import forget_loop, stop_cluster
from prefect_htcdask.condor.submit_description import WorkerJobError
from prefect_htcdask.gateway.checks import GatewayUnreachable
from prefect_htcdask.gateway.cluster import HTCGatewayCluster
from prefect_htcdask.gateway.endpoints import Endpoints, resolve_endpoints
from prefect_htcdask.gateway.finalizers import close_when_collected
from prefect_htcdask.gateway.scale_requests import worker_count
from prefect_htcdask.settings import HTCDaskSettings, SettingsError, WorkerSettings, load_settings
from prefect_htcdask.supervisor import oneshot
from prefect_htcdask.supervisor.client import SupervisorError
from prefect_htcdask.supervisor.gateway_http import CheckedGateway
from prefect_htcdask.utils.aio import in_thread


class HTCGateway(CheckedGateway):
    """A client of a Dask Gateway whose clusters have HTCondor workers; drop-in for dask_gateway's.

    Args:
        address: URL of the gateway. Default: settings, Dask's configuration, else the embedded gateway.
        proxy_address: where its proxy takes scheduler connections; an int is a port of the same host.
        public_address: URL of the gateway for browsers.
        auth: how to log in: a `GatewayAuth`, or its name.
        asynchronous: whether methods return awaitables.
        loop: the IOLoop to use.
        settings: prefect_htcdask's settings; read from the environment by default.

    Raises:
        SettingsError: a setting cannot work.
        EmbeddedError: the embedded pool and gateway could not be started.
    """

    def __init__(
        self,
        address: str | None = None,
        proxy_address: str | int | None = None,
        public_address: str | None = None,
        auth: str | GatewayAuth | None = None,
        asynchronous: bool = False,
        loop: Any = None,
        *,
        settings: HTCDaskSettings | None = None,
        parts: Endpoints | None = None,
    ) -> None:
        self.settings = settings or load_settings()
        self.parts = parts or resolve_endpoints(
            self.settings,
            address=address,
            proxy_address=proxy_address,
            public_address=public_address,
            auth=auth,
        )
        super().__init__(
            **self.parts.gateway_arguments,
            asynchronous=asynchronous,
            loop=loop,
        )

    def new_cluster(
        self, cluster_options: Any = None, shutdown_on_close: bool = True, **kwargs: Any
    ) -> HTCGatewayCluster:
        """Start a cluster; keywords are worker settings (cpus, memory, image, …) and options of the gateway."""
        return HTCGatewayCluster(
            cluster_options=cluster_options,
            shutdown_on_close=shutdown_on_close,
            asynchronous=self.asynchronous,
            loop=self.loop,
            settings=self.settings,
            parts=self.parts,
            **kwargs,
        )

    def connect(self, cluster_name: str, shutdown_on_close: bool = False) -> HTCGatewayCluster:
        """Connect to a running cluster; its workers can be scaled, and are removed with it."""
        return HTCGatewayCluster.from_name(
            cluster_name,
            shutdown_on_close=shutdown_on_close,
            asynchronous=self.asynchronous,
            loop=self.loop,
            settings=self.settings,
            parts=self.parts,
        )

    def close(self) -> Any:
        """Close this client; its clusters live on."""
        closing = super().close()
        if not self.asynchronous:
            forget_loop(self)
        return closing

    def __del__(self) -> None:
        close_when_collected(self, self)

    def submit(self, cluster_options: Any = None, **kwargs: Any) -> Any:
        """Have the gateway start a scheduler, and return the cluster's name at once; see `dask_gateway.Gateway.submit`.

        It has no workers and nobody looks after it, until somebody connects to it and scales it.

        Raises:
            SettingsError: a keyword is a setting of the workers, which this cluster does not keep.
        """
        settings = sorted(WorkerSettings.model_fields.keys() & kwargs.keys() - {"image"})
        if settings:
            raise SettingsError(
                f"submit({settings[0]}={kwargs[settings[0]]!r}) is a setting of the workers, and submit starts no more "
                "than a scheduler; give it to new_cluster, or to HTCGatewayCluster.from_name as you connect"
            )
        return super().submit(cluster_options=cluster_options, **kwargs)

    def scale_cluster(self, cluster_name: str, n: int, group: str | None = None, **kwargs: Any) -> Any:
        """Have `n` workers of a cluster, by its name; as `HTCGatewayCluster.scale`.

        Args:
            cluster_name: the cluster.
            n: how many.
            group: name of the worker group; the default group by default.

        Raises:
            ValueError: `n` is no number of workers, or there is no such group or cluster.
            GatewayClusterError: the cluster's workers cannot be scaled from here.
        """
        worker_count(n)
        return self.sync(self._ask_cluster, cluster_name, lambda cluster: cluster.scale(n, group), **kwargs)

    def adapt_cluster(
        self,
        cluster_name: str,
        minimum: int | None = None,
        maximum: float | None = None,
        active: bool = True,
        group: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Have the number of a cluster's workers follow its queue, by its name; as `HTCGatewayCluster.adapt`.

        Args:
            cluster_name: the cluster.
            minimum: workers kept in any case.
            maximum: workers at most.
            active: False: stop adapting, and keep as many workers as there are.
            group: name of the worker group; the default group by default.

        Raises:
            ValueError: minimum is above maximum, or negative, or there is no such group or cluster.
            GatewayClusterError: the cluster's workers cannot be scaled from here.
        """
        return self.sync(
            self._ask_cluster, cluster_name, lambda cluster: cluster.adapt(minimum, maximum, active, group), **kwargs
        )

    async def _ask_cluster(self, cluster_name: str, ask: Callable[[HTCGatewayCluster], Any]) -> None:
        # The gateway itself is not asked: it would start workers of its own.
        cluster = HTCGatewayCluster.from_name(cluster_name, asynchronous=True, settings=self.settings, parts=self.parts)
        async with cluster:
            await ask(cluster)

    def stop_cluster(self, cluster_name: str, **kwargs: Any) -> Any:
        """Stop a cluster and remove its worker jobs, found by their ads."""
        return self.sync(self._stop_cluster_and_jobs, cluster_name, **kwargs)

    async def _stop_cluster_and_jobs(self, cluster_name: str) -> None:
        # The scheduler first: a supervisor that hears no demand submits nothing in place of what is removed.
        await stop_cluster(self, cluster_name)
        await in_thread(oneshot.remove_jobs, self.parts.schedd, cluster_name)

    def __repr__(self) -> str:
        return f"HTCGateway<{self.address}>"


__all__ = [
    "GatewayClusterError",
    "GatewayUnreachable",
    "HTCGateway",
    "HTCGatewayCluster",
    "SupervisorError",
    "WorkerJobError",
]
