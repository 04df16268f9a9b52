"""A TCP proxy on loopback that counts what passes through it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

CHUNK = 1 << 16


@dataclass
class Traffic:
    """Bytes that have passed.

    Attributes:
        address: "tcp://host:port" of the proxy.
        sent: bytes from those who connect to it, to the server behind it.
        received: bytes the other way.
    """

    address: str
    sent: int = 0
    received: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, direction: str, size: int) -> None:
        """Add to `sent` or `received`."""
        with self._lock:
            setattr(self, direction, getattr(self, direction) + size)

    def since(self, earlier: tuple[int, int]) -> tuple[int, int]:
        """Bytes sent and received since then."""
        return self.sent - earlier[0], self.received - earlier[1]

    def now(self) -> tuple[int, int]:
        """Bytes sent and received so far."""
        return self.sent, self.received


@contextmanager
def counting_proxy(server: str) -> Iterator[Traffic]:
    """Pass connections on to `server` ("tcp://host:port") while the block lasts."""
    host, _, port = server.removeprefix("tcp://").rpartition(":")
    listener = socket.create_server(("127.0.0.1", 0))
    traffic = Traffic(f"tcp://127.0.0.1:{listener.getsockname()[1]}")
    threading.Thread(target=_accept, args=(listener, (host, int(port)), traffic), daemon=True).start()
    try:
        yield traffic
    finally:
        listener.close()


def _accept(listener: socket.socket, server: tuple[str, int], traffic: Traffic) -> None:
    while True:
        try:
            one, _ = listener.accept()
            other = socket.create_connection(server)
        except OSError:
            return
        for source, target, direction in ((one, other, "sent"), (other, one, "received")):
            threading.Thread(target=_pass_on, args=(source, target, traffic, direction), daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket, traffic: Traffic, direction: str) -> None:
    with suppress(OSError):
        while data := source.recv(CHUNK):
            traffic.count(direction, len(data))
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
