"""Addresses of hosts: URLs, or host:port as Dask and HTCondor write them."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def is_loopback(address: str) -> bool:
    """Whether an address, a URL or host:port, leads to this machine only."""
    host = urlsplit(with_scheme(address)).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return False
    return ip.is_loopback or ip.is_unspecified


def with_scheme(address: str) -> str:
    """An address that `urllib.parse.urlsplit` takes apart: without a scheme it would read the host as a path."""
    return address if "://" in address else f"//{address}"
