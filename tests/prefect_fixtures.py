"""The real Prefect server that tests run against."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

START_TIMEOUT = 90.0


@dataclass(frozen=True)
class PrefectServer:
    """A running Prefect server: its API's URL, what a process needs to use it, and its log."""

    url: str
    environment: dict[str, str]
    log: Path

    def tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _start(directory: Path) -> tuple[subprocess.Popen[bytes], PrefectServer]:
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    environment = {
        "PREFECT_HOME": str(directory / "home"),
        "PREFECT_API_URL": url,
        "PREFECT_PROFILES_PATH": str(directory / "profiles.toml"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": "INFO",
    }
    log = directory / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"],
            env={
                **os.environ,
                **environment,
                "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{directory / 'prefect.db'}",
            },
            cwd=directory,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return process, PrefectServer(url, environment, log)


def _wait_until_healthy(process: subprocess.Popen[bytes], server: PrefectServer) -> bool:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=2) as answer:
                if answer.status == 200:
                    return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    return False


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A Prefect server on loopback with a database of its own; this process uses it while the session lasts."""
    for _ in range(3):
        process, server = _start(tmp_path_factory.mktemp("prefect"))
        if _wait_until_healthy(process, server):
            break
        # Somebody else may have taken the port between finding it and using it.
        process.terminate()
        process.wait(10)
    else:
        pytest.fail(f"the Prefect server did not start:\n{server.tail()}")

    from prefect.settings import PREFECT_API_URL, PREFECT_HOME, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE, temporary_settings

    before = {name: os.environ.get(name) for name in server.environment}
    os.environ.update(server.environment)
    try:
        with temporary_settings(
            {
                PREFECT_API_URL: server.url,
                PREFECT_HOME: server.environment["PREFECT_HOME"],
                PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: False,
            }
        ):
            yield server
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


@pytest.fixture
def prefect_api(prefect_server: PrefectServer) -> PrefectServer:
    """The Prefect server; the end of its log is shown where the test fails."""
    return prefect_server


@pytest.fixture(scope="session")
def local_pool(prefect_server: PrefectServer) -> Iterator[Any]:
    """Two Dask workers of one thread each: a warm pool that flow runs share."""
    import distributed

    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", resources={"GPU": 1}
    ) as cluster:
        yield cluster


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Show the server's log below the failure of a test that uses it."""
    report = yield
    server = getattr(item, "funcargs", {}).get("prefect_server") or getattr(item, "funcargs", {}).get("prefect_api")
    if report.failed and server is not None:
        report.sections.append(("Prefect server log", server.tail()))
    return report
