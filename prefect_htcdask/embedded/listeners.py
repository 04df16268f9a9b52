"""Who listens at a TCP port of this machine: nothing secret is said to a port of ours that another user has taken.

Loopback is shared by all users of a host. A server that died, or has not begun to listen, leaves its port to whoever is
quicker, who is then told the password by a client that only knows the address.
"""

from __future__ import annotations

import ipaddress
import os
import pwd
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit

from prefect_htcdask.utils.net import is_loopback, with_scheme

IPAddress: TypeAlias = "ipaddress.IPv4Address | ipaddress.IPv6Address"

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
"""The TCP sockets of this network namespace: proc_net(5)."""

PORT_OWNERS = "HTCDASK_PORT_OWNERS"
"""Name in an HTCondor configuration: the ids of the users whose the pool's port on loopback may be."""

FIRST_PERSON = 1000
"""Below it are the ids of system accounts (UID_MIN of login.defs(5))."""

_LOOPBACK = (ipaddress.IPv4Address("127.0.0.1"), ipaddress.IPv6Address("::1"))
_REMEDY = "`prefect-htcdask down`, and the next start takes another port"
_LISTEN = "0A"


class ForeignListenerError(ConnectionError):
    """Another user, or nobody, listens at a port of ours. The message names the port and the user."""


@dataclass(frozen=True)
class Listener:
    """A socket that listens.

    Attributes:
        host: the address that it is bound to.
        uid: of the user who made it.
        inode: its number in the kernel, as in the links of /proc/PID/fd.
    """

    host: IPAddress
    uid: int
    inode: int


def check_listener(
    address: str, what: str, remedy: str, owners: Collection[int] | None = None, *, down: bool = False
) -> None:
    """Check that a port is listened to by a user whom we trust, before anything secret is said to it.

    Args:
        address: a URL or host:port of loopback.
        what: the server that should listen there, for the message.
        remedy: what to do about another user, for the message.
        owners: ids of the users whom we trust; by default our own alone.
        down: whether nobody may listen, so that connecting fails by itself.

    Raises:
        ForeignListenerError: it is another user's, nobody listens, or it cannot be found out.
    """
    trusted = {os.geteuid()} if owners is None else owners
    _check(address, what, remedy, lambda uid: uid in trusted, down)


def check_embedded_gateway(address: str) -> None:
    """Check that the embedded gateway's port is ours, before its password, a cookie or a token is sent there.

    Raises:
        ForeignListenerError: as in `check_listener`.
    """
    check_listener(address, "the embedded Dask Gateway", _REMEDY)


def check_pool(owners: str | None, collector: str | None) -> None:
    """Check that the port of the embedded pool is ours, before a daemon there is shown who we are.

    By HTCondor's FS method a client proves itself to whoever listens, who could pass the proof on to another schedd.

    Args:
        owners: what the pool's configuration has for `PORT_OWNERS`; `None` for a pool that is not embedded.
        collector: its COLLECTOR_HOST.

    Raises:
        ForeignListenerError: as in `check_listener`.
    """
    if owners and collector:
        check_listener(collector, "the embedded HTCondor pool", _REMEDY, {int(uid) for uid in owners.split()})


def check_configured_gateway(address: str) -> None:
    """Check that a gateway of the user's choice on loopback is no other person's, before anything secret is sent there.

    It may be a service of this host, with an account of its own, or end a tunnel of ours.

    Raises:
        ForeignListenerError: as in `check_listener`.
    """
    if is_loopback(address):
        remedy = "where that user's gateway is meant, name it by this host's name"
        _check(address, f"the gateway at gateway.address = {address!r}", remedy, _is_trustworthy, True)


def _check(address: str, what: str, remedy: str, trusted: Callable[[int], bool], down: bool) -> None:
    where = f"{what}: port {urlsplit(with_scheme(address)).port} on {urlsplit(with_scheme(address)).hostname}"
    try:
        found = listeners(address)
    except OSError as exc:
        raise ForeignListenerError(f"{where}: it cannot be found out who listens there ({exc})") from exc
    if not found and not down:
        raise ForeignListenerError(f"{where} is listened to by nobody: it does not run, or is just starting")
    if strangers := sorted({listener.uid for listener in found if not trusted(listener.uid)}):
        users = " and ".join(f"user {user_name(uid)!r}" for uid in strangers)
        raise ForeignListenerError(
            f"{where} is listened to by {users}, not by you: nothing secret is sent there; {remedy}"
        )


def _is_trustworthy(uid: int) -> bool:
    """Whether a user is ourselves or an account of the system's, which nobody logs in to."""
    if uid == os.geteuid() or uid < FIRST_PERSON:
        return True
    try:
        return pwd.getpwuid(uid).pw_shell.rpartition("/")[2] in ("nologin", "false")
    except KeyError:
        return False


def listeners(address: str) -> list[Listener]:
    """The sockets that would take a connection to an address of this machine.

    Args:
        address: a URL, or host:port.

    Raises:
        OSError: the kernel's table cannot be read.
        ValueError: the address has no port, or is no IP address or localhost.
    """
    hosts, port = _hosts_and_port(address)
    found = [listener for table in TABLES for listener in _read(table, port)]
    best = []
    for host in hosts:
        # Linux prefers the socket that is bound to the very address.
        exact = [listener for listener in found if listener.host == host]
        best += exact or [listener for listener in found if listener.host.is_unspecified]
    return list(dict.fromkeys(best))


def listens(address: str, pid: int) -> bool:
    """Whether a process, whose files we may look at, holds the socket that takes connections to an address.

    Raises:
        OSError: the kernel's table cannot be read.
    """
    wanted = {f"socket:[{listener.inode}]" for listener in listeners(address)}
    return any(link in wanted for link in _open_files(pid))


def foreign_listener(address: str, owners: Collection[int] | None = None) -> str | None:
    """The name of another user who listens at an address of ours, or `None`; `owners` as in `check_listener`."""
    trusted = {os.geteuid()} if owners is None else owners
    with suppress(OSError):
        for listener in listeners(address):
            if listener.uid not in trusted:
                return user_name(listener.uid)
    return None


def user_name(uid: int) -> str:
    """A user's name, or the id where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _hosts_and_port(address: str) -> tuple[tuple[IPAddress, ...], int]:
    parts = urlsplit(with_scheme(address))
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    host = parts.hostname
    if port is None or host is None:
        raise ValueError(f"{address!r} has no host and port")
    if host == "localhost" or host.endswith(".localhost"):
        return _LOOPBACK, port
    ip = ipaddress.ip_address(host)
    # A connection to the unspecified address goes to loopback: ip(7).
    return ((_LOOPBACK[ip.version == 6] if ip.is_unspecified else ip),), port


def _read(table: Path, port: int) -> Iterator[Listener]:
    try:
        lines = table.read_text().splitlines()[1:]
    except FileNotFoundError:
        if table == TABLES[0]:
            raise
        return  # no IPv6
    for line in lines:
        fields = line.split()
        host, _, number = fields[1].rpartition(":")
        if fields[3] == _LISTEN and int(number, 16) == port:
            yield Listener(_host(host), int(fields[7]), int(fields[9]))


def _host(text: str) -> IPAddress:
    """An address as the kernel prints it: 32-bit words in hexadecimal, each in the machine's byte order."""
    words = (int(text[start : start + 8], 16).to_bytes(4, sys.byteorder) for start in range(0, len(text), 8))
    host = ipaddress.ip_address(b"".join(words))
    return (host.ipv4_mapped or host) if isinstance(host, ipaddress.IPv6Address) else host


def _open_files(pid: int) -> Iterator[str]:
    with suppress(OSError):
        for file in os.scandir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                yield os.readlink(file.path)
