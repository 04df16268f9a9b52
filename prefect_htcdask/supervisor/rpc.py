"""The supervisor's own connections: to the Dask scheduler's plugin, and to the gateway that can stop it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from dask_gateway.client import ClusterStatus, GatewaySecurity
from distributed.core import rpc

from prefect_htcdask.supervisor.gateway_http import CheckedGateway
from prefect_htcdask.supervisor.protocol import GatewayAccess

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT = 10.0


class SchedulerLink:
    """Asks the scheduler's plugin. An answer that does not come in time is no answer, never a zero.

    Args:
        access: addresses and TLS material of the cluster.
        owner: this supervisor's identity.
        offers: the Dask resources that one worker of each group offers.
    """

    def __init__(self, access: GatewayAccess, owner: str, offers: Mapping[str, Mapping[str, float]]) -> None:
        self.access = access
        self.owner = owner
        self.offers = {name: dict(offer) for name, offer in offers.items()}
        self.epoch = 0
        security = GatewaySecurity(tls_key=access.tls_key, tls_cert=access.tls_cert)
        self._rpc = rpc(access.scheduler_address, connection_args=security.get_connection_args("client"))

    async def _ask(self, op: str, timeout: float = _ANSWER_TIMEOUT, **kwargs: Any) -> Any:
        return await asyncio.wait_for(getattr(self._rpc, op)(**kwargs), timeout)

    async def claim(self) -> dict[str, Any]:
        """Ask for the cluster; the answer says whether it was granted, and who owns it."""
        answer: dict[str, Any] = await self._ask("htcdask_claim", owner=self.owner, offers=self.offers)
        if answer["granted"]:
            self.epoch = answer["epoch"]
        return answer

    async def demand(self) -> dict[str, Any] | None:
        """The scheduler's demand, or `None` where it did not answer."""
        try:
            answer: dict[str, Any] = await self._ask("htcdask_demand", owner=self.owner, epoch=self.epoch)
            return answer
        except Exception as exc:  # whatever went wrong on the way, the demand is unknown
            logger.info("no answer from the scheduler: %s: %s", type(exc).__name__, exc)
            return None

    async def retire(self, names: list[str], idle_only: bool) -> list[str]:
        """Retire workers; returns the names of those that go, at once or when their tasks have ended.

        Those that could not, or are busy again where `idle_only` spares these, are kept.
        """
        try:
            retired: list[str] = await self._ask("htcdask_retire", timeout=60, names=names, idle_only=idle_only)
            return retired
        except Exception as exc:
            logger.warning("retirement failed: %s: %s", type(exc).__name__, exc)
            return []

    async def pardon(self, names: list[str]) -> None:
        """Tell of workers that HTCondor took away: their loss is no task's fault."""
        try:
            await self._ask("htcdask_pardon", names=names)
        except Exception as exc:
            logger.warning("the scheduler was not told of evictions: %s: %s", type(exc).__name__, exc)

    async def quiet(self, quiet: bool) -> None:
        """Have the workers write nothing to the submitting host, or write again."""
        try:
            await self._ask("htcdask_quiet", quiet=quiet)
        except Exception as exc:
            logger.warning("the workers were not told of the full disk: %s: %s", type(exc).__name__, exc)

    async def close(self) -> None:
        """Close the connection."""
        await self._rpc.close_rpc()


class GatewayLink:
    """Asks the gateway for the cluster's status, and stops the cluster."""

    def __init__(self, access: GatewayAccess) -> None:
        self._access = access

    def _gateway(self) -> Any:
        access = self._access
        return CheckedGateway(
            address=access.address,
            proxy_address=access.proxy_address,
            public_address=access.public_address,
            auth=access.auth,
            asynchronous=True,
        )

    async def is_over(self) -> bool:
        """Whether the gateway says that the cluster is stopped; unknown counts as not over."""
        try:
            async with self._gateway() as gateway:
                report = await asyncio.wait_for(gateway.get_cluster(self._access.cluster_name), _ANSWER_TIMEOUT)
        except ValueError:
            return True  # 404: the gateway does not know it any more
        except Exception as exc:
            logger.info("no answer from the gateway: %s: %s", type(exc).__name__, exc)
            return False
        return report.status not in (ClusterStatus.PENDING, ClusterStatus.RUNNING)

    async def stop(self) -> bool:
        """Stop the cluster; returns whether the gateway took the request. Stopping twice is harmless."""
        try:
            async with self._gateway() as gateway:
                await asyncio.wait_for(gateway.stop_cluster(self._access.cluster_name), _ANSWER_TIMEOUT)
        except ValueError:
            return True
        except Exception as exc:
            logger.warning("the gateway did not stop the cluster: %s: %s", type(exc).__name__, exc)
            return False
        return True
