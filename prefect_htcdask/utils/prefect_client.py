"""Clients of the Prefect API that are shared with nobody, for what works beside a flow's engine.

Prefect's server closes a connection that was idle for 5 s (uvicorn, ``--timeout-keep-alive``), where Prefect's client
keeps it for 25 s: whoever asks every 5 s finds it closing under the request. Here a connection is kept for less, and a
request that fails on a kept one is sent again at once on a new one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from functools import partial
from typing import Any

import httpx
from prefect.client.orchestration import PrefectClient, SyncPrefectClient, get_client
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from prefect_htcdask.compat.prefect import http_client
from prefect_htcdask.errors import HTCDaskError
from prefect_htcdask.utils.web_proxies import client_proxy

KEEP_ALIVE = 2.0
"""Seconds for which an idle connection is kept."""

KEPT = 8
"""Idle connections that are kept, as many as Prefect's own client keeps."""

TIMEOUT = 10.0
"""Seconds that a request may take."""

_BROKEN = (httpx.ReadError, httpx.WriteError, httpx.CloseError, httpx.RemoteProtocolError)
"""What httpx raises where the other side has closed a connection."""


class PrefectAPIError(HTCDaskError):
    """The Prefect API does not answer, or does not let us in. The message names the setting and the remedy."""


def _httpx_settings(timeout: float | None) -> dict[str, Any]:
    # Settings of its own also have `get_client` make a new client, and not give the engine's, which is open.
    limits = httpx.Limits(max_connections=2 * KEPT, max_keepalive_connections=KEPT, keepalive_expiry=KEEP_ALIVE)
    return {"limits": limits} if timeout is None else {"limits": limits, "timeout": timeout}


@contextmanager
def open_client(timeout: float | None = TIMEOUT, retries: int | None = 0) -> Iterator[SyncPrefectClient]:
    """An open client of the API that the settings name.

    Args:
        timeout: seconds that a request may take; `None`: Prefect's setting.
        retries: attempts of Prefect's client beyond the first, about 2 s, 4 s, … later; `None`: Prefect's setting.

    Raises:
        ValueError: the settings name no API.
        RuntimeError: Prefect could not start one.
    """
    changed = nullcontext() if retries is None else temporary_settings({PREFECT_CLIENT_MAX_RETRIES: retries})
    with changed, _new_client(timeout) as client:
        yield client


def _new_client(timeout: float | None) -> SyncPrefectClient:
    client = get_client(httpx_settings=_httpx_settings(timeout), sync_client=True)
    send_again_where_kept(client)
    return client


@asynccontextmanager
async def open_async_client() -> AsyncIterator[PrefectClient]:
    """As `open_client`, for asyncio, with the time limit and the attempts of Prefect's settings."""
    async with get_client(httpx_settings=_httpx_settings(None)) as client:
        yield client


def send_again_where_kept(client: SyncPrefectClient) -> None:
    """Have a client send a request again at once that failed on a connection which it had kept."""
    http: Any = http_client(client)
    if not isinstance(http.send, partial):
        http.send = partial(_send, http.send)


def _send(send: Callable[..., httpx.Response], request: httpx.Request, *args: Any, **kwargs: Any) -> httpx.Response:
    connected = False

    def trace(event: str, info: Any) -> None:
        nonlocal connected
        connected = connected or event.startswith("connection.connect")

    extensions = request.extensions
    request.extensions = {**extensions, "trace": trace}
    try:
        for _ in range(KEPT):
            try:
                return send(request, *args, **kwargs)
            except _BROKEN:
                if connected:
                    raise
        return send(request, *args, **kwargs)
    finally:
        request.extensions = extensions


@contextmanager
def prefect_api() -> Iterator[SyncPrefectClient]:
    """An open client for commands and hooks, whose errors name the setting and the remedy.

    Raises:
        PrefectAPIError: no API is configured, or it fails a question asked within the context.
    """
    try:
        client = _new_client(timeout=None)
    except (ValueError, RuntimeError) as exc:
        # Where no address is set, Prefect may try to start a server of its own.
        hint = "" if "PREFECT_API_URL" in str(exc) else " Set PREFECT_API_URL to the address of a running server"
        raise PrefectAPIError(f"no Prefect API can be had: {exc}{hint}") from exc
    named = f"the Prefect API at {str(client.api_url).rstrip('/')} (PREFECT_API_URL)"
    proxy = client_proxy(str(client.api_url))
    named += f", by way of {proxy}," if proxy else ""
    hint = f"; if it is to be asked directly, add its host to no_proxy (of {proxy.variable})" if proxy else ""
    try:
        with client:
            yield client
    except httpx.HTTPStatusError as exc:
        status = exc.response.status_code
        if status in (401, 403):
            raise PrefectAPIError(
                f"{named} does not let us in ({status}): check PREFECT_API_KEY, or PREFECT_API_AUTH_STRING for a "
                f"server of your own{hint}"
            ) from exc
        raise PrefectAPIError(f"{named} answers with status {status}; is it the address of an API?{hint}") from exc
    except httpx.HTTPError as exc:
        raise PrefectAPIError(
            f"{named} cannot be reached: {str(exc) or type(exc).__name__}; is the server running, and the address "
            f"right?{hint}"
        ) from exc
