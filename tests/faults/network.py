"""A network between one worker and everything else, which can be cut: a veth pair into the worker's namespace."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

HOST, WORKER = "10.213.77.1", "10.213.77.2"
IDLE, INTERVAL, PROBES = 15, 15, 9
"""Seconds, seconds and count of TCP keepalive in Go's net package, which dask-gateway-proxy uses (net/dial.go)."""


def missing() -> str:
    """Why no network can be made here; empty where it can."""
    if os.geteuid() != 0:
        return "a network interface between namespaces needs root"
    for command in ("ip", "nsenter", "unshare"):
        if shutil.which(command) is None:
            return f"there is no {command} (iproute2, util-linux)"
    tried = subprocess.run(["ip", "link", "add", "htcdask-t", "type", "veth", "peer", "name", "htcdask-u"], **_QUIET)
    if tried.returncode != 0:
        return f"this machine lets root make no veth pair: {tried.stderr.strip()}"
    _ip("link", "delete", "htcdask-t")
    return ""


_QUIET = {"capture_output": True, "text": True}


def _ip(*arguments: str, inside: int | None = None) -> None:
    enter = [] if inside is None else ["nsenter", f"--net=/proc/{inside}/ns/net"]
    subprocess.run([*enter, "ip", *arguments], check=True, **_QUIET)


@contextmanager
def host_side() -> Iterator[str]:
    """The host's end of the wire while the block lasts; returns its name."""
    name, peer = f"htcdask{os.getpid() % 100000}", f"htcdaskw{os.getpid() % 10000}"
    _ip("link", "add", name, "type", "veth", "peer", "name", peer)
    try:
        # Not on the wire itself: the host's own connections to this address outlive a cut. Replaced, not added, since a
        # run that was killed leaves it behind.
        _ip("addr", "replace", f"{HOST}/32", "dev", "lo")
        # Nothing for the worker goes elsewhere while the wire is cut.
        _ip("route", "replace", "blackhole", f"{WORKER}/32", "metric", "4000")
        mend(name)
        yield name
    finally:
        for undo in (
            ("link", "delete", name),
            ("addr", "delete", f"{HOST}/32", "dev", "lo"),
            ("route", "delete", "blackhole", f"{WORKER}/32", "metric", "4000"),
        ):
            with suppress(subprocess.CalledProcessError):
                _ip(*undo)


def plug_in(claim: Path) -> None:
    """Give the process that waits in `claim` (see `wrapped_python.own_network`) the other end of the wire."""
    pid = int((claim / "pid").read_text())
    peer = f"htcdaskw{os.getpid() % 10000}"
    _ip("link", "set", peer, "netns", str(pid))
    _ip("link", "set", "lo", "up", inside=pid)
    _ip("addr", "add", f"{WORKER}/32", "dev", peer, inside=pid)
    _ip("link", "set", peer, "up", inside=pid)
    _ip("route", "add", f"{HOST}/32", "dev", peer, inside=pid)
    (claim / "ready").touch()


def cut(name: str) -> None:
    """Pull the cable: every packet is dropped, and no end is told."""
    _ip("link", "set", name, "down")


def mend(name: str) -> None:
    """Let packets through."""
    _ip("link", "set", name, "up")
    _ip("route", "add", f"{WORKER}/32", "dev", name, "src", HOST)


class Relay:
    """Takes connections, by default at the host's end of the wire, and passes them on to a port of loopback.

    Args:
        port: of loopback.
        host: address at which connections are taken.
    """

    def __init__(self, port: int, host: str = HOST) -> None:
        self._target = port
        self._clients: dict[int, socket.socket] = {}
        self._listener = socket.create_server((host, 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        # A blocked accept is not woken by close alone.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def cut(self, pid: int) -> int:
        """Close the connections that one process has made; returns how many."""
        ours = [one for one in psutil.Process(pid).net_connections("tcp") if one.raddr and one.raddr.port == self.port]
        ends = [end for one in ours if (end := self._clients.pop(one.laddr.port, None)) is not None]
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        return len(ends)

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, peer = self._listener.accept()
                self._clients[peer[1]] = client
                threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        with client, suppress(OSError), socket.create_connection(("127.0.0.1", self._target)) as target:
            for option, value in (("KEEPIDLE", IDLE), ("KEEPINTVL", INTERVAL), ("KEEPCNT", PROBES)):
                client.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{option}"), value)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            back = threading.Thread(target=_pump, args=(target, client), daemon=True)
            back.start()
            _pump(client, target)
            back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            sink.sendall(data)
    except OSError:
        pass
    finally:
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
