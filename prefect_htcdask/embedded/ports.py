"""Ports for servers that must know theirs before they listen, and sockets for those that are given theirs."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from pathlib import Path

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOWEST = 10240
"""Below it are the ports of well-known services, which may be down just now."""

ATTEMPTS = 100


def free_port() -> int:
    """A TCP port of loopback that nothing listens at, and that the kernel gives to nobody.

    A port that the kernel chose (`bind` to port 0) is free for a moment only: it goes to the next who asks for any, and
    every Dask scheduler and worker does, as does each outgoing connection. So it is one outside their range, where the
    host leaves room below it. Another user may take it all the same before the server does, so what is said to it has
    to be preceded by a look at who listens (`listeners`).
    """
    for port in _candidates():
        try:
            return _bound(port)
        except OSError:
            continue
    return _bound(0)


def listening_socket() -> socket.socket:
    """A socket that listens at such a port from this moment on, to be handed over to the server.

    Whoever holds it keeps the port, also while the server starts, or starts again: connections wait meanwhile.
    """
    for port in _candidates():
        try:
            return socket.create_server(("127.0.0.1", port), backlog=128)
        except OSError:
            continue
    return socket.create_server(("127.0.0.1", 0), backlog=128)


def _candidates() -> Iterator[int]:
    ports = _outside(EPHEMERAL)
    # Not the generator that a flow may have seeded: two of them would choose alike.
    yield from random.SystemRandom().sample(ports, min(ATTEMPTS, len(ports)))


def _outside(file: Path) -> range:
    """The ports below the kernel's own range; none where it cannot be read or leaves no room."""
    try:
        return range(LOWEST, int(file.read_text().split()[0]))
    except (OSError, ValueError, IndexError):
        return range(0)


def _bound(port: int) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))
        number: int = probe.getsockname()[1]
    return number
