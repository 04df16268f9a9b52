"""The ports of the embedded pool and gateway, where another user of the host is after them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from prefect_htcdask import HTCGateway
from prefect_htcdask.condor.address import ScheddAddress
from prefect_htcdask.embedded import EmbeddedEndpoint, EmbeddedError, ensure_running, status
from prefect_htcdask.embedded.gateway_server import list_clusters
from prefect_htcdask.embedded.listeners import ForeignListenerError, listeners
from prefect_htcdask.embedded.state import StateDirectory
from prefect_htcdask.gateway.endpoints import Endpoints
from prefect_htcdask.settings import EmbeddedSettings
from prefect_htcdask.supervisor.gateway_http import EmbeddedAuth
from tests.support.own_pool import COUNT_JOBS, in_pool, keeper_with, start_cluster, until
from tests.support.stranger import stranger
from tests.support.waiting import wait_until

pytestmark = pytest.mark.daemons

TAKEN = """
from prefect_htcdask.embedded import gateway_server
taken = {}
real = gateway_server.free_port
gateway_server.free_port = lambda: taken.pop() if taken else real()
"""
"""As if others had taken these ports between the choice and the proxy's start."""

NO_SOCKET = """
from prefect_htcdask.embedded.service import Service
start = Service.start
def without_socket(self):
    given = self.listener
    if self.name == "condor":
        self.listener = None
    start(self)
    self.listener = given
Service.start = without_socket
"""
"""As an HTCondor that was built without systemd's library: it does not see the socket."""


@contextmanager
def keeper_asleep(settings: EmbeddedSettings) -> Iterator[None]:
    """So that a port stays free for as long as another user may need to take it."""
    keeper = psutil.Process(status(settings)["keeper"])
    keeper.suspend()
    try:
        yield
    finally:
        keeper.resume()


def kill(process: psutil.Process) -> None:
    process.kill()
    wait_until(lambda: process.status() == psutil.STATUS_ZOMBIE, 30, f"{process} is dead")


def service(settings: EmbeddedSettings, name: str) -> psutil.Process:
    return psutil.Process(status(settings)["processes"][name])


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def client(endpoint: EmbeddedEndpoint) -> HTCGateway:
    """A client that has kept address and login."""
    login = EmbeddedAuth(endpoint.username, endpoint.password)
    schedd = ScheddAddress(config_file=str(endpoint.condor_config))
    return HTCGateway(
        parts=Endpoints(endpoint.gateway_address, endpoint.proxy_address, None, login, schedd, embedded=True)
    )


def test_the_port_of_a_dead_gateway_in_another_s_hands_gets_no_password(own: EmbeddedSettings) -> None:
    endpoint = ensure_running(own)
    cluster = start_cluster(endpoint)
    with client(endpoint) as gateway:
        assert [one.name for one in gateway.list_clusters()] == [cluster]  # it has a cookie from now on
        with keeper_asleep(own):
            kill(service(own, "proxy"))
            attack = stranger(port_of(endpoint.gateway_address))
            other = attack.__enter__()
        try:
            assert other.port != 0
            words = rf"port {other.port} on 127\.0\.0\.1 is listened to by user '.*', not by you"
            with pytest.raises(ForeignListenerError, match=words):
                gateway.list_clusters()
            with pytest.raises(ForeignListenerError, match=words):
                list_clusters(endpoint.gateway_address, endpoint.username, endpoint.password)
            # The keeper cannot move a port that clusters and clients know; it says who has it.
            said = until(lambda: status(own)["message"], timeout=60)
            assert f"127.0.0.1:{other.port} of the gateway is listened to by user" in said
            assert status(own)["running"] is False
        finally:
            attack.__exit__(None, None, None)
        # The health of whoever answers is asked for with nothing secret, if at all.
        assert b"uthorization" not in other.heard and b"ookie" not in other.heard
        until(lambda: status(own)["running"], timeout=60)
        assert status(own)["message"] == ""
        assert [one.name for one in gateway.list_clusters()] == [cluster]


def test_a_port_that_is_taken_before_the_proxy_listens_is_left_alone(
    own: EmbeddedSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stranger() as first, stranger() as second:
        keeper_with(TAKEN.format([first.port, second.port]), monkeypatch)
        endpoint = ensure_running(own)
        assert port_of(endpoint.gateway_address) not in (0, first.port, second.port)
        assert endpoint.proxy_address in endpoint.gateway_address
        assert start_cluster(endpoint) in status(own)["gateway"]["clusters"]
    assert (first.heard, second.heard) == (b"", b"")


def test_who_takes_every_port_is_named(own: EmbeddedSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    with stranger() as other:
        keeper_with(TAKEN.format([other.port] * 100), monkeypatch)
        with pytest.raises(EmbeddedError, match=rf"127\.0\.0\.1:{other.port} of the gateway is listened to by user '"):
            ensure_running(own)
    assert other.heard == b""


def test_the_ports_of_dead_servers_stay_ours(own: EmbeddedSettings) -> None:
    """Gateway server and pool are given sockets that the keeper holds on to."""
    endpoint = ensure_running(own)
    collector = status(own)["pool"]["collector_address"]
    config = (StateDirectory(own.directory).gateway / "gateway_config.py").read_text()
    private = next(line.split("'")[1] for line in config.splitlines() if line.startswith("c.DaskGateway.address"))
    proxy = service(own, "proxy")
    # Tokens go to the server's own port, not to the proxy's.
    assert f"http://{private}/api/v1/routes" in proxy.cmdline()
    assert f"""api_url = "http://" + '{private}' + "/api"\n""" in config
    for name, address in (("gateway", private), ("condor", collector)):
        with keeper_asleep(own):
            dead = [service(own, name)]
            for process in [*dead[0].children(recursive=True), *dead]:
                process.kill()
            wait_until(lambda dead=dead: dead[0].status() == psutil.STATUS_ZOMBIE, 30, f"{name} is dead")
            (ours,) = listeners(address)
            assert ours.uid == os.geteuid()
            with stranger(port_of(address)) as other:
                assert other.port == 0
        until(lambda name=name, dead=dead: status(own)["processes"].get(name) not in (None, dead[0].pid), timeout=60)
        until(lambda: status(own)["running"], timeout=60)
    assert in_pool(endpoint, COUNT_JOBS).returncode == 0


def test_every_daemon_is_reached_by_the_pool_s_one_port(own: EmbeddedSettings) -> None:
    ensure_running(own)
    pool = status(own)["pool"]
    assert pool["schedd_address"].startswith(f"<{pool['collector_address']}?")
    assert "sock=schedd" in pool["schedd_address"]


def test_an_htcondor_that_takes_no_socket_binds_its_port(
    own: EmbeddedSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper_with(NO_SOCKET, monkeypatch)
    endpoint = ensure_running(own)
    assert "takes no socket" in (endpoint.directory / "keeper.log").read_text()
    assert in_pool(endpoint, COUNT_JOBS).stdout.strip() == "0"
    (listener,) = listeners(status(own)["pool"]["collector_address"])
    assert str(listener.uid) in (endpoint.condor_config or tmp_path).read_text()


def test_a_keeper_that_is_killed_leaves_no_port_behind(own: EmbeddedSettings) -> None:
    endpoint = ensure_running(own)
    addresses = [endpoint.gateway_address, status(own)["pool"]["collector_address"]]
    os.kill(status(own)["keeper"], signal.SIGKILL)
    for address in addresses:
        until(lambda address=address: not listeners(address), timeout=60)
