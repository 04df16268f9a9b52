"""`HTCGatewayCluster`: a gateway cluster whose workers are HTCondor jobs, looked after by a supervisor process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dask_gateway import GatewayCluster, GatewayClusterError
from dask_gateway.auth import GatewayAuth

from prefect_htcdask.compat.dask_gateway import forget_loop, stop_cluster, submit, use_class
from prefect_htcdask.condor.submit_description import FlowRunTag
from prefect_htcdask.gateway.checks import ask_for_options, check_scheduler_versions
from prefect_htcdask.gateway.dask_client import InterruptibleClient
from prefect_htcdask.gateway.endpoints import Endpoints, resolve_endpoints, worker_offers, worker_specs
from prefect_htcdask.gateway.finalizers import PrivateGateway, close_when_collected
from prefect_htcdask.gateway.run_directory import cluster_directory, record_cluster
from prefect_htcdask.gateway.scale_requests import adapt_request, hold_request, scale_request, worker_count
from prefect_htcdask.gateway.supervisor_config import (
    gateway_access,
    scheduler_plugins,
    start_supervisor,
    supervisor_config,
)
from prefect_htcdask.scheduler.worker_groups import OFFERS_METADATA
from prefect_htcdask.settings import HTCDaskSettings, WorkerSettings, load_settings
from prefect_htcdask.supervisor import oneshot
from prefect_htcdask.supervisor.client import SupervisorError, SupervisorHandle
from prefect_htcdask.supervisor.protocol import GATEWAY_TIMEOUT
from prefect_htcdask.utils.aio import in_thread

logger = logging.getLogger(__name__)

_WORKER_FIELDS = frozenset(WorkerSettings.model_fields)


class HTCGatewayCluster(GatewayCluster):
    """A gateway cluster whose workers are HTCondor jobs; drop-in for `dask_gateway.GatewayCluster`.

    Args:
        address: URL of the gateway, as in `HTCGateway`.
        proxy_address: where its proxy takes scheduler connections.
        public_address: its URL for browsers.
        auth: how to log in to it.
        cluster_options: options of the gateway (`Gateway.cluster_options`).
        shutdown_on_close: whether closing stops the cluster and removes its workers. If False, both live on after
            this process until they are shut down, or until the gateway's idle timeout.
        asynchronous: whether methods return awaitables, as in dask_gateway.
        loop: the IOLoop to use, as in dask_gateway.
        settings: prefect_htcdask's settings; read from the environment by default.
        flow_run: the flow run that the workers belong to.
        worker_secrets: environment variables for the worker processes alone: never in an ad.
        on_message: called from a thread with what the supervisor says; the default logs it.
        n_workers: workers to start with, of the default group.
        workers: several kinds of workers, by the names of their groups, the default group first: mappings of fields of
            the worker settings, and of `minimum` and `maximum`; the settings' by default. Each group is scaled by
            itself.
        kwargs: fields of the worker settings (cpus, memory, disk, gpus, nthreads, image, container_image, …), and
            otherwise options of the gateway.

    Raises:
        SettingsError: a setting cannot work; nothing was started.
        GatewayUnreachable: the gateway does not answer, or does not let us in.
        SupervisorError: the schedd is unreachable or refuses us; the gateway cluster was stopped again.
    """

    def __init__(
        self,
        address: str | None = None,
        proxy_address: str | int | None = None,
        public_address: str | None = None,
        auth: str | GatewayAuth | None = None,
        cluster_options: Any = None,
        shutdown_on_close: bool = True,
        asynchronous: bool = False,
        loop: Any = None,
        *,
        settings: HTCDaskSettings | None = None,
        parts: Endpoints | None = None,
        flow_run: FlowRunTag | None = None,
        worker_secrets: Mapping[str, str] | None = None,
        on_message: Callable[[dict[str, Any]], None] | None = None,
        n_workers: int | None = None,
        workers: Mapping[str, Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in _WORKER_FIELDS}
        self._prepare(settings, flow_run, worker_secrets, on_message, given, workers)
        if n_workers is not None:
            self._fixed = worker_count(n_workers)
        self.parts = parts or resolve_endpoints(
            self.settings, address=address, proxy_address=proxy_address, public_address=public_address, auth=auth
        )
        super().__init__(
            **self.parts.gateway_arguments,
            cluster_options=cluster_options,
            shutdown_on_close=shutdown_on_close,
            asynchronous=asynchronous,
            loop=loop,
            **kwargs,
        )

    def _prepare(
        self,
        settings: HTCDaskSettings | None,
        flow_run: FlowRunTag | None,
        worker_secrets: Mapping[str, str] | None,
        on_message: Callable[[dict[str, Any]], None] | None,
        worker: Mapping[str, Any],
        workers: Mapping[str, Mapping[str, Any]] | None,
    ) -> None:
        settings = settings or load_settings()
        if worker or workers is not None:
            stated = settings.stated()
            groups = stated.get("workers") if workers is None else workers
            checked = load_settings(
                worker={**stated["worker"], **worker},
                workers=groups,
                # What is checked beside them.
                adaptive=stated["adaptive"],
                lease=stated["lease"],
            )
            settings = settings.model_copy(update={"worker": checked.worker, "workers": checked.workers})
        self.settings = settings
        self.specs = worker_specs(settings)
        self._offers: Mapping[str, Mapping[str, float]] = worker_offers(settings)
        self.flow_run = flow_run
        self.summary: dict[str, Any] = {}
        self._worker_secrets = dict(worker_secrets or {})
        self._on_message = on_message
        self._supervisor: SupervisorHandle | None = None
        self._fixed = 0
        self._connected = False
        self._shutdown_wanted = False

    @classmethod
    def from_name(
        cls,
        cluster_name: str,
        shutdown_on_close: bool = False,
        address: str | None = None,
        proxy_address: str | int | None = None,
        public_address: str | None = None,
        auth: str | GatewayAuth | None = None,
        asynchronous: bool = False,
        loop: Any = None,
        *,
        settings: HTCDaskSettings | None = None,
        parts: Endpoints | None = None,
        workers: Mapping[str, Mapping[str, Any]] | None = None,
        **worker: Any,
    ) -> HTCGatewayCluster:
        """Connect to a running cluster by its name.

        Its worker groups are those that it has. The keywords, worker settings, are for a cluster that nobody looks
        after any more: they say what the workers are that `scale` adds.
        """
        self: HTCGatewayCluster = object.__new__(cls)
        self._prepare(settings, None, None, None, worker, workers)
        self._connected = True
        self.parts = parts or resolve_endpoints(
            self.settings, address=address, proxy_address=proxy_address, public_address=public_address, auth=auth
        )
        self._init_internal(
            **self.parts.gateway_arguments,
            asynchronous=asynchronous,
            loop=loop,
            shutdown_on_close=shutdown_on_close,
            name=cluster_name,
        )
        return self

    @property
    def workers_are_local(self) -> bool:
        """Whether all workers run on this machine, and so share its files and its loopback."""
        return self.parts.workers_are_local

    @property
    def run_directory(self) -> Path:
        """Where the workers' logs are. Its name is what the worker jobs have in HTCDaskClusterName."""
        return cluster_directory(self.settings, self.name)

    # Start

    async def _start_async(self) -> None:
        if self.status in ("closing", "closed"):
            return
        use_class(self.gateway, PrivateGateway)
        if not self._connected:
            # Both take about a second: the checks run while the gateway starts the scheduler.
            self._supervisor = await in_thread(self._start_supervisor)
            await self._ask_gateway()
        try:
            if not self._connected:
                await self._ask_for_cluster()
            await self._start_scheduler()
            check_scheduler_versions(await self.scheduler_comm.versions(), self.gateway.address)
            if not self._connected:
                await self._give_workers_to_supervisor()
            else:
                await self._learn_groups()
        except BaseException:
            if self.name is not None and not self._connected:
                self.shutdown_on_close = True
            raise

    async def _start_scheduler(self) -> None:
        """Wait until the scheduler runs, and connect to it.

        Raises:
            GatewayClusterError: it did not start; of the embedded gateway, the message ends with the scheduler's log.
        """
        try:
            await super()._start_async()
        except GatewayClusterError as exc:
            if not self.parts.embedded or self.name is None:
                raise
            from prefect_htcdask.embedded import scheduler_log_tail

            said = scheduler_log_tail(self.settings.embedded, self.name)
            why = f"the scheduler said last:\n{said}" if said else "the scheduler has said nothing"
            raise GatewayClusterError(f"{exc} {why}") from exc

    async def _ask_gateway(self) -> None:
        """Reach the gateway, log in, and take up its option for an image."""
        options = await ask_for_options(self.gateway)
        image = self.settings.worker.image
        if image and "image" in options and self._cluster_options is None:
            self._cluster_kwargs.setdefault("image", image)

    async def _ask_for_cluster(self) -> None:
        """Have the gateway start a cluster, and register it with the supervisor before anything else can happen."""
        assert self._supervisor is not None
        self.status = "starting"
        asking = asyncio.ensure_future(submit(self.gateway, self._cluster_options, self._cluster_kwargs))
        try:
            self.name = await asyncio.shield(asking)
        except asyncio.CancelledError:
            # The gateway may have started it all the same: only with its name can it be stopped.
            self.name = await asking
            raise
        finally:
            if self.name is not None:
                self._supervisor.register_cluster(gateway_access(self))
                self._record()

    def _record(self) -> None:
        """Write down whose cluster it is: the sweep must know, though it may never have had a job."""
        if self.flow_run is not None:
            record_cluster(
                self.run_directory,
                self.flow_run,
                lease=self.settings.lease.duration,
            )

    def _start_supervisor(self) -> SupervisorHandle:
        return start_supervisor(self.settings, self.parts.schedd, self.specs, self._take_message)

    async def _give_workers_to_supervisor(self) -> None:
        """Install the scheduler's plugins, then hand the cluster over."""
        assert self._supervisor is not None
        await in_thread(self._supervisor.wait_checked)
        offers = worker_offers(self.settings)
        lease = self.settings.lease
        for name, plugin in scheduler_plugins(lease.duration, offers, lease.scheduler_duration).items():
            await self.scheduler_comm.register_scheduler_plugin(plugin=plugin, name=name, idempotent=True)
        plan = supervisor_config(
            self,
            specs=self.specs,
            settings=self.settings,
            schedd=self.parts.schedd,
            flow_run=self.flow_run,
            worker_secrets=self._worker_secrets,
            run_directory=self.run_directory,
            fixed=self._fixed,
        )
        await in_thread(self._supervisor.hand_off, plan)
        # For those who connect to this cluster, with this class or only to its scheduler.
        await self.scheduler_comm.set_metadata(keys=list(OFFERS_METADATA), value=offers)
        self._supervisor.keep_log_in(self.run_directory)

    def _take_message(self, message: dict[str, Any]) -> None:
        if self._on_message is not None:
            self._on_message(message)
        elif message["kind"] in ("log", "waiting"):
            logger.log(logging.getLevelName(message["level"].upper()), message["text"])
        elif message["kind"] == "failed":
            logger.error(message["text"])

    def get_client(self, set_as_default: bool = True) -> Any:
        """A `distributed.Client` of this cluster, as `dask_gateway.GatewayCluster.get_client`."""
        client = InterruptibleClient(
            self,
            security=self.security,
            set_as_default=set_as_default,
            asynchronous=self.asynchronous,
            loop=self.loop,
        )
        if not self.asynchronous:
            self._clients.add(client)
        return client

    # Scaling

    @property
    def worker_offers(self) -> dict[str, dict[str, float]]:
        """The Dask resources that one worker of each group offers, by the group's name, the default group first."""
        return {name: dict(offer) for name, offer in self._offers.items()}

    async def _learn_groups(self) -> None:
        """The worker groups of a running cluster, which its owner wrote down at the scheduler."""
        offers = await self.scheduler_comm.get_metadata(keys=list(OFFERS_METADATA), default=None)
        if offers:
            self._offers = offers

    def scale(self, n: int, group: str | None = None, **kwargs: Any) -> Any:
        """Have `n` workers of a group: submits or removes the difference only.

        Args:
            n: how many.
            group: name of the worker group; the default group by default.

        Raises:
            ValueError: `n` is no number of workers, or there is no such group.
        """
        return self.gateway.sync(self._set_target, scale_request(n, group, self._offers), **kwargs)

    def adapt(
        self,
        minimum: int | None = None,
        maximum: float | None = None,
        active: bool = True,
        group: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Follow the number of a group's queued tasks between `minimum` and `maximum` workers.

        Args:
            minimum: workers kept in any case; default: the settings'.
            maximum: workers at most; default, and where it is infinite: the settings'.
            active: False: stop adapting, and keep as many workers as there are.
            group: name of the worker group; the default group by default.

        Raises:
            ValueError: minimum is above maximum, or negative, or there is no such group.
        """
        if active:
            request = adapt_request(minimum, maximum, group, self._offers, self.settings)
        else:
            request = hold_request(group, self._offers)
        return self.gateway.sync(self._set_target, request, **kwargs)

    async def _set_target(self, request: dict[str, Any]) -> None:
        if self._supervisor is None:
            # The cluster's owner, if one lives, takes the wish from the scheduler; else we become it.
            with suppress(Exception):
                if (await self.scheduler_comm.htcdask_scale(request=request))["owner"] is not None:
                    return
            if list(self._offers) != list(self.specs):
                raise GatewayClusterError(
                    f"cluster {self.name} has the worker groups {', '.join(self._offers)}, and nobody looks after them "
                    f"any more; to scale them, connect with the same workers= (here: {', '.join(self.specs)})"
                )
            self._supervisor = await in_thread(self._start_supervisor)
            await self._give_workers_to_supervisor()
        arguments = {name: value for name, value in request.items() if name != "op"}
        try:
            await in_thread(self._supervisor.request, request["op"], **arguments)
        except SupervisorError as exc:
            raise GatewayClusterError(str(exc)) from exc

    # End

    def close(self, shutdown: bool | None = None) -> Any:
        """Close this object, and where `shutdown` (default: `shutdown_on_close`) the cluster and its workers too."""
        closing = super().close(shutdown=shutdown)
        if not self.asynchronous:
            forget_loop(self.gateway)
        return closing

    def __del__(self) -> None:
        close_when_collected(self, self.__dict__.get("gateway"))

    async def _stop_internal(self, shutdown: bool | None = None) -> None:
        self._shutdown_wanted = self.shutdown_on_close if shutdown is None else shutdown
        # The base class would ask the gateway itself, and wait for minutes where that hangs.
        await super()._stop_internal(shutdown=False)

    async def _stop_async(self) -> None:
        await super()._stop_async()
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            if self._shutdown_wanted or self.name is None:
                self.summary = await in_thread(supervisor.close)
            else:
                await in_thread(supervisor.detach)
        elif self._shutdown_wanted and self.name is not None and self._connected:
            # The scheduler first: its owner submits nothing in place of what is removed.
            await stop_cluster(self.gateway, self.name)
            await in_thread(oneshot.remove_jobs, self.parts.schedd, self.name)
            return
        if self._shutdown_wanted and self.name is not None:
            # A supervisor that owns the cluster has asked already, and asks on until the gateway answers.
            try:
                await asyncio.wait_for(stop_cluster(self.gateway, self.name), GATEWAY_TIMEOUT)
            except Exception as exc:
                level = logging.INFO if self.summary else logging.ERROR
                logger.log(level, "gateway cluster %s was not stopped: %s", self.name, str(exc) or type(exc).__name__)

    def __repr__(self) -> str:
        return f"HTCGatewayCluster<{self.name}, status={self.status}>"
