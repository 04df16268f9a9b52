"""What is checked of a gateway before any worker is submitted: that it answers, lets us in, and has our versions."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import aiohttp
from dask_gateway import Gateway, GatewayClusterError

from prefect_htcdask.compat.dask_gateway import cluster_options
from prefect_htcdask.embedded.listeners import ForeignListenerError
from prefect_htcdask.settings import SettingsError
from prefect_htcdask.supervisor.gateway_http import web_proxy


class GatewayUnreachable(GatewayClusterError):
    """The gateway does not answer, or does not let us in. The message names the setting and the remedy."""


async def ask_for_options(gateway: Gateway) -> Any:
    """The gateway's cluster options: the cheapest question that needs a login.

    Raises:
        GatewayUnreachable: it does not answer, or does not let us in.
    """
    proxy = web_proxy(gateway)
    named = f"the gateway at gateway.address = {gateway.address!r}" + (f", by way of {proxy}," if proxy else "")
    hint = f"; if it is to be asked directly, add its host to no_proxy (of {proxy.variable})" if proxy else ""
    try:
        return await cluster_options(gateway)
    except ForeignListenerError as exc:
        raise GatewayUnreachable(str(exc)) from exc
    except aiohttp.ClientHttpProxyError as exc:
        raise GatewayUnreachable(
            f"{named} cannot be reached: the proxy says {exc.status}: {exc.message}{hint}"
        ) from exc
    except aiohttp.ClientResponseError as exc:
        if exc.status in (401, 403):
            raise GatewayUnreachable(
                f"{named} does not accept our login ({exc.status}); check gateway.username and gateway.password, or "
                f"gateway.token, or the block that gateway.credentials_block names{hint}"
            ) from exc
        raise GatewayUnreachable(f"{named} answers with status {exc.status}: {exc.message}{hint}") from exc
    except ValueError as exc:
        # dask_gateway's own client raises it for 404: a gateway's proxy says so while it knows no server.
        raise GatewayUnreachable(
            f"{named} answers {str(exc)!r}: no Dask Gateway is there, or its server is just starting behind its proxy"
            + hint
        ) from exc
    except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as exc:
        raise GatewayUnreachable(
            f"{named} cannot be reached: {exc or type(exc).__name__}; is it running, and is the address right?{hint}"
        ) from exc


def local_versions() -> dict[str, str]:
    """Versions that scheduler, workers and client must share: Python's without its micro number."""
    return {
        "python": ".".join(map(str, sys.version_info[:2])),
        "dask": version("dask"),
        "distributed": version("distributed"),
    }


def check_scheduler_versions(answer: Mapping[str, Any], address: str) -> None:
    """Compare the scheduler's versions with ours, before anything is submitted.

    Args:
        answer: what the scheduler's `versions` handler says.
        address: the gateway's address, for the message.

    Raises:
        SettingsError: they differ; the message says which.
    """
    packages = answer.get("packages", {})
    python = dict(answer.get("host", {})).get("python") or packages.get("python")
    theirs = {
        "python": ".".join(str(python).split(".")[:2]) if python else None,
        "dask": packages.get("dask"),
        "distributed": packages.get("distributed"),
    }
    different = [
        f"{name} {theirs[name]} on the scheduler, {here} here"
        for name, here in local_versions().items()
        if theirs[name] not in (None, here)
    ]
    if different:
        raise SettingsError(
            f"the scheduler of {address} has other versions: {'; '.join(different)}. Install the same here, or choose "
            "another image of the gateway (worker.image, cluster_options)"
        )
