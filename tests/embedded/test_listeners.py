"""Who listens at a port of loopback (`listeners.py`), and that no secret is told to another user who does."""

from __future__ import annotations

import os
import pwd
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from dask_gateway.auth import BasicAuth

from prefect_htcdask.condor.address import ScheddAddress
from prefect_htcdask.embedded import listeners
from prefect_htcdask.embedded.gateway_server import list_clusters
from prefect_htcdask.embedded.listeners import ForeignListenerError, check_embedded_gateway, check_listener
from prefect_htcdask.gateway.checks import GatewayUnreachable, ask_for_options
from prefect_htcdask.gateway.finalizers import PrivateGateway
from prefect_htcdask.supervisor import oneshot
from prefect_htcdask.supervisor.client import SupervisorError
from prefect_htcdask.supervisor.gateway_http import EmbeddedAuth
from tests.support.stranger import UID, stranger

HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def line(host: str, port: int, uid: int, inode: int, state: str = "0A") -> str:
    remote = "0" * len(host)
    return f"   0: {host}:{port:04X} {remote}:0000 {state} 00000000:00000000 00:00000000 00000000 {uid} 0 {inode} 1\n"


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernel's table, which the test writes, of an x86 machine and the like."""
    monkeypatch.setattr(listeners, "TABLES", (tmp_path / "tcp", tmp_path / "tcp6"))
    monkeypatch.setattr(listeners.sys, "byteorder", "little")
    (tmp_path / "tcp").write_text(HEADER)
    return tmp_path


@contextmanager
def listening(host: str) -> Iterator[int]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("bound", "named"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "localhost"),
        ("0.0.0.0", "127.0.0.1"),
        ("::1", "[::1]"),
        ("::1", "localhost"),
        ("::", "[::1]"),
    ],
)
def test_our_own_socket_is_found_wherever_it_is_bound(bound: str, named: str) -> None:
    try:
        with listening(bound) as port:
            for address in (f"http://{named}:{port}/path", f"{named}:{port}"):
                (found,) = listeners.listeners(address)
                assert found.uid == os.geteuid()
                assert listeners.listens(address, os.getpid()) and not listeners.listens(address, os.getppid())
                check_listener(address, "it", "")
    except OSError as error:
        if ":" not in bound:
            raise
        pytest.skip(f"no IPv6 here: {error}")
    with pytest.raises(ForeignListenerError, match=rf"it: port {port} on .* is listened to by nobody"):
        check_listener(address, "it", "")
    check_listener(address, "it", "", down=True)


def test_another_user_is_named(table: Path) -> None:
    other = next(entry for entry in pwd.getpwall() if entry.pw_uid != os.geteuid())
    (table / "tcp").write_text(HEADER + line("0100007F", 8000, other.pw_uid, 5))
    with pytest.raises(
        ForeignListenerError,
        match=rf"^the embedded Dask Gateway: port 8000 on 127\.0\.0\.1 is listened to by user '{other.pw_name}', "
        r"not by you: nothing secret is sent there; .*prefect-htcdask down",
    ):
        check_embedded_gateway("http://127.0.0.1:8000")
    check_listener("127.0.0.1:8000", "it", "", {other.pw_uid})


@pytest.mark.parametrize(
    ("rows", "ours"),
    [
        pytest.param([("0100007F", 0, "0A"), ("00000000", 7, "0A")], True, id="the exact one comes first"),
        pytest.param([("00000000", 0, "0A"), ("0100007F", 7, "0A")], False, id="also where it is the other's"),
        pytest.param([("0100007F", 0, "0A"), ("0100007F", 7, "01")], True, id="a connection is no listener"),
        pytest.param([("0100007F", 0, "0A"), ("0100007F", 7, "0A")], False, id="one of two is not enough"),
    ],
)
def test_the_socket_that_takes_the_connection_counts(table: Path, rows: list[tuple[str, int, str]], ours: bool) -> None:
    lines = (line(host, 8000, os.geteuid() + uid, 5 + uid, state) for host, uid, state in rows)
    (table / "tcp").write_text(HEADER + "".join(lines))
    (table / "tcp").open("a").write(line("0100007F", 8001, os.geteuid() + 7, 99))
    assert (listeners.foreign_listener("127.0.0.1:8000") is None) is ours


def test_a_mapped_address_of_ipv6_counts(table: Path) -> None:
    (table / "tcp6").write_text(HEADER + line("0000000000000000FFFF00000100007F", 8000, os.geteuid() + 1, 5))
    assert listeners.foreign_listener("127.0.0.1:8000") is not None


def test_a_table_that_cannot_be_read_is_no_leave_to_send_a_password(table: Path) -> None:
    (table / "tcp").unlink()
    with pytest.raises(ForeignListenerError, match="it cannot be found out who listens there"):
        check_embedded_gateway("http://127.0.0.1:8000")


@pytest.mark.parametrize("auth", [EmbeddedAuth, BasicAuth])
async def test_a_client_tells_no_password_to_who_took_the_port(auth: type[BasicAuth]) -> None:
    """Of the embedded gateway; and of one that is configured, where its user is a person who logs in."""
    with pytest.MonkeyPatch.context() as patch, stranger() as other:
        patch.setattr(listeners, "_is_trustworthy", lambda uid: uid == os.geteuid())
        login = auth("anne", "the-password")
        async with PrivateGateway(f"http://{other.address}", auth=login, asynchronous=True) as gateway:
            with pytest.raises(ForeignListenerError, match=f"port {other.port} .*'{pwd.getpwuid(UID).pw_name}'"):
                await gateway.list_clusters()
            with pytest.raises(GatewayUnreachable, match=f"'{pwd.getpwuid(UID).pw_name}', not by you"):
                await ask_for_options(gateway)
        with pytest.raises(ForeignListenerError):
            list_clusters(f"http://{other.address}", "anne", "the-password")
    assert other.heard == b""


@pytest.mark.parametrize(
    ("uid", "shell", "trusted"),
    [(0, "/bin/bash", True), (999, "/bin/sh", True), (1234, "/bin/bash", False), (1234, "/usr/sbin/nologin", True)],
)
def test_a_gateway_of_the_user_s_choice_may_be_a_service_s(
    uid: int, shell: str, trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = pwd.struct_passwd(("dask", "x", uid, uid, "", "/", shell))
    monkeypatch.setattr(listeners.pwd, "getpwuid", lambda uid: account)
    monkeypatch.setattr(listeners.os, "geteuid", lambda: 4321)
    assert listeners._is_trustworthy(uid) is trusted


def test_nothing_is_proved_to_who_took_the_port_of_the_pool(tmp_path: Path) -> None:
    config = tmp_path / "condor_config"
    with stranger() as other:
        config.write_text(
            f"{listeners.PORT_OWNERS} = {os.geteuid()}\nCOLLECTOR_HOST = {other.address}\n"
            f"LOCAL_DIR = {tmp_path}\nLOG = {tmp_path}\nRELEASE_DIR = /usr\n"
        )
        (tmp_path / ".schedd_address").write_text(f"<{other.address}>\n")
        for operation in ("user", "query"):
            with pytest.raises(SupervisorError, match=f"HTCondor pool: port {other.port} .* is listened to by user"):
                oneshot.call(ScheddAddress(config_file=str(config)), operation, *["true"][: operation == "query"])
    assert other.heard == b""
