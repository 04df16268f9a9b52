"""The stock Dask Gateway server and its proxy: their configuration, commands and the little of their API that we use.

The server has none of our code: it reads one generated configuration file. `UnsafeLocalBackend` starts a scheduler as
a process of the gateway's own user; it is unsafe only for a gateway of several users, and this one has one.
(`LocalBackend` would change files' owners, and is broken for root.)
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import secrets
import sys
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prefect_htcdask.embedded.errors import EmbeddedError
from prefect_htcdask.embedded.listeners import check_embedded_gateway
from prefect_htcdask.embedded.ports import free_port, listening_socket
from prefect_htcdask.utils.private_file import write_private

_CONFIG = '''\
"""Configuration of the embedded Dask Gateway. Generated; it holds secrets."""
import hmac
import os
import socket
from asyncio.base_subprocess import BaseSubprocessTransport

from aiohttp import web
from dask_gateway_server.auth import SimpleAuthenticator, unauthorized
from dask_gateway_server.backends.local import UnsafeLocalBackend


class OneUser(SimpleAuthenticator):
    """Basic authentication of the one user of this gateway."""

    username = {username!r}

    async def authenticate(self, request):
        user = await super().authenticate(request)
        if not hmac.compare_digest(user.name.encode(), self.username.encode()):
            raise unauthorized("Basic")
        return user


class Backend(UnsafeLocalBackend):
    """Keeps the last words of schedulers, which tell why one did not start."""

    def cleanup_working_directory(self, workdir):
        said = os.path.join(self.get_logs_directory(workdir), "scheduler.log")
        if os.path.exists(said):
            os.replace(said, os.path.join({scheduler_logs!r}, os.path.basename(workdir) + ".log"))
        super().cleanup_working_directory(workdir)


# The keeper gives the server a socket that listens already (sd_listen_fds(3)): another user cannot have its port.
if os.environ.pop("LISTEN_PID", None) == str(os.getpid()):
    web.TCPSite = lambda runner, host, port, **options: web.SockSite(runner, socket.socket(fileno=3), **options)
c.DaskGateway.address = {private_address!r}
c.DaskGateway.backend_class = Backend
c.DaskGateway.authenticator_class = OneUser
c.SimpleAuthenticator.password = {password!r}

c.Proxy.address = {proxy_address!r}
c.Proxy.externally_managed = True
c.Proxy.gateway_url = "http://" + {private_address!r}
c.Proxy.api_token = {api_token!r}

# Schedulers send their tokens to the server itself, not by way of the proxy, whose port another user may have taken.
c.UnsafeLocalBackend.api_url = "http://" + {private_address!r} + "/api"
c.UnsafeLocalBackend.cluster_start_timeout = {start_timeout!r}
c.UnsafeLocalBackend.clusters_directory = {clusters!r}
# On disk, and clusters left alone, so that a restart of the server goes unnoticed.
c.UnsafeLocalBackend.db_url = {database!r}
c.UnsafeLocalBackend.db_encrypt_keys = [{encrypt_key!r}]
c.UnsafeLocalBackend.stop_clusters_on_shutdown = False
# As the server's event loop goes, asyncio kills what it started, where no thread of its own waits for it (Python 3.12
# and newer).
BaseSubprocessTransport.__del__ = lambda transport: None
c.UnsafeLocalBackend.cluster_status_period = 5
c.UnsafeLocalBackend.sigint_timeout = 10
c.UnsafeLocalBackend.sigterm_timeout = 10
c.UnsafeLocalBackend.inherited_environment = {inherited!r}

c.ClusterConfig.scheduler_cmd = {scheduler!r}
c.ClusterConfig.worker_cmd = {worker!r}
'''

SCHEDULER_START_TIMEOUT = 300.0
"""Seconds that a scheduler may take until it answers, on however busy a machine; one that ends is noticed sooner."""

INHERITED = ["PATH", "PYTHONPATH", "CONDA_PREFIX", "VIRTUAL_ENV", "LANG", "LC_ALL", "HOME", "TMPDIR"]
"""Environment variables that a scheduler gets from the gateway's process."""


KEPT_LOGS = 50
"""Logs of schedulers that are gone which a start leaves."""


def scheduler_logs(gateway: Path) -> Path:
    """Where the logs of schedulers are that are gone, each named after its cluster.

    Args:
        gateway: the directory of the gateway's files.
    """
    return gateway / "scheduler-logs"


def check_installed() -> None:
    """Raises `EmbeddedError` where dask-gateway-server is not installed."""
    if find_spec("dask_gateway_server") is None:
        raise EmbeddedError(
            "dask-gateway-server is not installed, so there is no embedded gateway; install prefect-htcdask[embedded], "
            "or set gateway.address to a Dask Gateway"
        )


class GatewayServer:
    """A gateway server and its proxy in one directory.

    Args:
        directory: for their files.
        username: the only user whom the gateway accepts.
        password: that user's.
    """

    def __init__(self, directory: Path, username: str, password: str) -> None:
        self.directory = directory
        self.username = username
        self._password = password
        self.config_file = directory / "gateway_config.py"
        self.listener = listening_socket()
        self.private_address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.proxy_address = f"127.0.0.1:{free_port()}"
        self._api_token = secrets.token_hex(32)
        self._encrypt_key = base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()

    @property
    def url(self) -> str:
        """Where clients reach the gateway: the proxy, which cannot be given a socket."""
        return f"http://{self.proxy_address}"

    def move_proxy(self) -> None:
        """Choose another port for the proxy, whose last one somebody else has."""
        self.proxy_address = f"127.0.0.1:{free_port()}"
        self._write_configuration()

    def configure(self) -> None:
        """Write the configuration file and forget the clusters of an earlier server.

        The server would signal the process ids in an old database, which may be anyone's by now.
        """
        clusters = self.directory / "clusters"
        clusters.mkdir(parents=True, exist_ok=True, mode=0o700)
        scheduler_logs(self.directory).mkdir(exist_ok=True, mode=0o700)
        for old in sorted(scheduler_logs(self.directory).glob("*.log"), key=os.path.getmtime)[:-KEPT_LOGS]:
            old.unlink()
        self.directory.chmod(0o700)
        database = self.directory / "gateway.sqlite"
        for old in self.directory.glob("gateway.sqlite*"):
            old.unlink()
        database.touch(mode=0o600)
        self._write_configuration()

    def _write_configuration(self) -> None:
        text = _CONFIG.format(
            username=self.username,
            password=self._password,
            private_address=self.private_address,
            proxy_address=self.proxy_address,
            api_token=self._api_token,
            encrypt_key=self._encrypt_key,
            clusters=str(self.directory / "clusters"),
            database=f"sqlite:///{self.directory / 'gateway.sqlite'}",
            scheduler_logs=str(scheduler_logs(self.directory)),
            start_timeout=SCHEDULER_START_TIMEOUT,
            inherited=INHERITED,
            scheduler=[sys.executable, "-m", "distributed.cli.dask_scheduler"],
            worker=[sys.executable, "-m", "distributed.cli.dask_worker"],
        )
        write_private(self.config_file, text)

    @property
    def server_command(self) -> list[str]:
        return [sys.executable, "-m", "dask_gateway_server", "-f", str(self.config_file)]

    @property
    def proxy_command(self) -> list[str]:
        return [sys.executable, "-m", "dask_gateway_server", "proxy", "-f", str(self.config_file)]

    def healthy(self) -> bool:
        """Whether server and proxy answer. Who answers is for the caller to find out."""
        try:
            return bool(get_json(f"{self.url}/api/health")["status"] == "pass")
        except (OSError, ValueError, KeyError):
            return False

    def active_clusters(self) -> int:
        """How many clusters are pending or running.

        Raises:
            OSError: where the gateway does not answer.
        """
        return len(list_clusters(f"http://{self.private_address}", self.username, self._password))


def get_json(url: str, username: str | None = None, password: str | None = None, timeout: float = 30) -> Any:
    """GET a JSON document, past any HTTP proxy of the environment.

    Raises:
        OSError: where the server does not answer or refuses, or, before the login is sent, where it is not ours.
        ValueError: where the answer is not JSON.
    """
    request = urllib.request.Request(url)
    if username is not None:
        check_embedded_gateway(url)
        login = base64.b64encode(f"{username}:{password}".encode()).decode()
        request.add_header("Authorization", f"Basic {login}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout) as response:
            return json.load(response)
    except http.client.HTTPException as exc:
        raise ConnectionError(f"{url} is not answered by a Dask Gateway: {type(exc).__name__}") from exc


def list_clusters(url: str, username: str, password: str) -> dict[str, Any]:
    """The gateway's pending and running clusters, by name.

    Raises:
        OSError: where the gateway does not answer or refuses.
    """
    clusters: dict[str, Any] = get_json(f"{url}/api/v1/clusters/", username, password)
    return clusters
