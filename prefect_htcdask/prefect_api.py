"""The Prefect API for what works beside flows: a client of its own, whose errors name the setting and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.context import SyncClientContext

from prefect_htcdask.errors import HTCDaskError
from prefect_htcdask.web_proxies import client_proxy


class PrefectAPIError(HTCDaskError):
    """The Prefect API does not answer, or does not let us in. The message names the setting and the remedy."""


@contextmanager
def prefect_api() -> Iterator[SyncPrefectClient]:
    """A client that is shared with nobody, within a flow too.

    Raises:
        PrefectAPIError: no API is configured, or it fails a question asked within the context.
    """
    # Within a flow, `get_client` would give the engine's own client, which cannot be opened twice.
    token = SyncClientContext.__var__.set(cast(Any, None))
    try:
        client = get_client(sync_client=True)
    except (ValueError, RuntimeError) as exc:
        # Where no address is set, Prefect may try to start a server of its own.
        hint = "" if "PREFECT_API_URL" in str(exc) else " Set PREFECT_API_URL to the address of a running server"
        raise PrefectAPIError(f"no Prefect API can be had: {exc}{hint}") from exc
    finally:
        SyncClientContext.__var__.reset(token)
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
