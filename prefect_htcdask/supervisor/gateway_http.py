"""What dask_gateway's client asks a gateway for, and how: by no proxy that the user excepted, and of no stranger.

dask_gateway 2026.3 takes `http_proxy` for every address, `no_proxy` or not (`dask_gateway.client`, dask-gateway#103).
"""

from __future__ import annotations

from typing import Any

import dask
from dask_gateway import Gateway
from dask_gateway.auth import BasicAuth

from prefect_htcdask.embedded.listeners import check_configured_gateway, check_embedded_gateway
from prefect_htcdask.utils.web_proxies import WebProxy, environment_proxy


class EmbeddedAuth(BasicAuth):
    """The login of the embedded gateway, which is ours: it is shown to no other user who has taken its port."""

    def pre_request(self, resp: Any) -> Any:
        """The login's headers, at the moment that they are wanted."""
        check_embedded_gateway(str(resp.url.origin()))
        return super().pre_request(resp)


class CheckedGateway(Gateway):
    """dask_gateway's client, which looks at each request where it goes."""

    _request_kwargs: dict[str, Any]

    async def _request(self, method: str, url: str, json: Any = None) -> Any:
        # A cookie is as good as the password, and goes with every request.
        if isinstance(self.auth, EmbeddedAuth):
            check_embedded_gateway(self.address)
        else:
            check_configured_gateway(self.address)
        if asks_directly(self):
            self._request_kwargs = {**self._request_kwargs, "proxy": None, "proxy_auth": None}
        return await super()._request(method, url, json=json)


def web_proxy(gateway: Gateway) -> WebProxy | None:
    """The proxy of the environment by way of which a gateway is asked; `None` where none is, or Dask's setting says."""
    if isinstance(gateway.auth, EmbeddedAuth) or not _from_environment():
        return None
    return environment_proxy(gateway.address)


def asks_directly(gateway: Gateway) -> bool:
    """Whether a gateway is asked directly, whatever dask_gateway took from the environment."""
    if isinstance(gateway.auth, EmbeddedAuth):
        return True
    return _from_environment() and web_proxy(gateway) is None


def _from_environment() -> bool:
    """Whether Dask's setting leaves the proxy to the environment, as by default; one that names a proxy stays."""
    return dask.config.get("gateway.http-client.proxy", True) is True
