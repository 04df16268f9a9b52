"""A Prefect server of one's own on loopback, for the demo, the tests and the benchmarks."""

from __future__ import annotations

import ctypes
import http.client
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import getproxies

from prefect_htcdask.embedded.listeners import foreign_listener, listens
from prefect_htcdask.embedded.ports import free_port

START_TIMEOUT = 300.0
"""Seconds, on however busy a machine; a server that ends meanwhile is noticed at once."""
STOP_TIMEOUT = 60.0
ATTEMPTS = 5
"""Ports that are tried, where others take them before the server listens."""

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class ServerError(RuntimeError):
    """The Prefect server did not start. The message ends with what it said last."""


@dataclass(frozen=True)
class PrefectServer:
    """A running server.

    Attributes:
        url: address of its API.
        environment: what a process needs to use it, and nobody's else profile or database.
        log: what it and its services say.
    """

    url: str
    environment: dict[str, str]
    log: Path

    @property
    def ui(self) -> str:
        """Address of the UI."""
        return self.url.removesuffix("/api")

    def tail(self, lines: int = 60) -> str:
        """The last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


@contextmanager
def prefect_server(
    directory: Path, *, ui: bool = False, database: str | None = None, port: int | None = None
) -> Iterator[PrefectServer]:
    """Run a server while the block lasts, and the thread that entered it: it ends with a process that is killed.

    Args:
        directory: for its database, its home and its log; made with mode 0700.
        ui: whether it serves the UI.
        database: SQLAlchemy URL of its database; SQLite in `directory` by default.
        port: TCP port that it listens at; a free one by default.

    Raises:
        ServerError: it did not answer in time.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for _ in range(ATTEMPTS):
        process, server = _start(directory, ui, database, port or free_port())
        try:
            if _wait_until_healthy(process, server):
                yield server
                return
        finally:
            _stop(process)
        # Somebody else may have taken the port between finding it and using it.
        user = foreign_listener(server.url)
    taken = f"{server.url} is listened to by user {user!r}, not by it; " if user else ""
    raise ServerError(f"the Prefect server did not start: {taken}it says:\n{server.tail()}")


def _start(directory: Path, ui: bool, database: str | None, port: int) -> tuple[subprocess.Popen[bytes], PrefectServer]:
    url = f"http://127.0.0.1:{port}/api"
    environment = {
        "PREFECT_HOME": str(directory / "home"),
        "PREFECT_API_URL": url,
        "PREFECT_PROFILES_PATH": str(directory / "profiles.toml"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        # Prefect's client would ask for loopback by way of a web proxy of the environment.
        "no_proxy": ",".join(filter(None, [getproxies().get("no"), "127.0.0.1", "localhost"])),
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    own = {"PREFECT_API_DATABASE_CONNECTION_URL": database or f"sqlite+aiosqlite:///{directory / 'prefect.db'}"}
    log = directory / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--ui" if ui else "--no-ui"],
            env={**os.environ, **environment, **own},
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    return process, PrefectServer(url, environment, log)


def _end_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_until_healthy(process: subprocess.Popen[bytes], server: PrefectServer) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        try:
            # Somebody else may have been quicker to take the port, and would answer too.
            if listens(server.url, process.pid):
                with opener.open(f"{server.url}/health", timeout=30) as answer:
                    if answer.status == 200:
                        return True
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.1)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_TIMEOUT)
