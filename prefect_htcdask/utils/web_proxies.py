"""The web proxy of the environment for an address: none where `no_proxy` excepts it, and none on loopback."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

from prefect_htcdask.utils.net import is_loopback


@dataclass(frozen=True)
class WebProxy:
    """A proxy that the environment names.

    Attributes:
        url: its address, without the login that may be in it.
        variable: the environment variable that names it.
    """

    url: str
    variable: str

    def __str__(self) -> str:
        return f"the proxy {self.url} of {self.variable}"


def environment_proxy(address: str) -> WebProxy | None:
    """The proxy by way of which a URL is to be asked, or `None`: it is asked directly.

    `no_proxy` is read as `urllib.request` does (names and their subdomains, with or without a port, and ``*``), and
    networks such as 10.0.0.0/8 too, as curl and Go do. Lower-case variables come before upper-case ones.
    """
    parts = urlsplit(address)
    if parts.hostname is None or is_loopback(address) or _is_excepted(parts.hostname, parts.port):
        return None
    return _named_proxy(address)


def client_proxy(address: str) -> WebProxy | None:
    """The proxy that Prefect's client takes for a URL: httpx spares loopback only where `no_proxy` excepts it."""
    parts = urlsplit(address)
    return None if proxy_bypass(parts.hostname or "") else _named_proxy(address)


def _named_proxy(address: str) -> WebProxy | None:
    """The proxy that the environment names for a URL's scheme, whatever is excepted."""
    scheme = urlsplit(address).scheme
    url = getproxies().get(scheme)
    if not url:
        return None
    variables = (f"{scheme}_proxy", f"{scheme}_proxy".upper())
    variable = next((name for name in variables if os.environ.get(name)), f"{scheme}_proxy")
    parts = urlsplit(url)
    plain = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return WebProxy(plain, variable)


def _is_excepted(host: str, port: int | None) -> bool:
    if proxy_bypass(f"{host}:{port}" if port else host):
        return True
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return False
    for name in re.split(r"[,\s]+", getproxies().get("no", "")):
        try:
            network = ipaddress.ip_network(name, strict=False)
        except ValueError:
            continue
        if ip in network:
            return True
    return False
