"""The real Prefect server that tests run against."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import platformdirs
import pytest
from filelock import FileLock
from prefect import flow, get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker

from tools.prefect_server import PrefectServer
from tools.prefect_server import prefect_server as running_server

__all__ = ["PrefectServer", "nothing"]


@flow
def nothing() -> None:
    """A flow for flow runs that the tests move themselves."""


def empty_database() -> Path:
    """A Prefect server's database as its first start makes it, a third of that start; once for each version."""
    cache = platformdirs.user_cache_path("prefect-htcdask", ensure_exists=True)
    made = cache / f"prefect-{version('prefect')}.db"
    with FileLock(cache / "prefect-database.lock"):
        if not made.exists():
            scratch = made.with_suffix(".new")
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(mode=0o700)
            environment = {
                **os.environ,
                "PREFECT_HOME": str(scratch),
                "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{scratch / 'prefect.db'}",
            }
            command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
            subprocess.run(command, env=environment, check=True, capture_output=True, timeout=600)
            with closing(sqlite3.connect(scratch / "prefect.db")) as database:
                database.execute("VACUUM INTO ?", (str(scratch / "whole.db"),))  # with what is in its journal
            (scratch / "whole.db").replace(made)
            shutil.rmtree(scratch)
    return made


@contextmanager
def used_here(directory: Path) -> Iterator[PrefectServer]:
    """A Prefect server on loopback with a database of its own, which this process uses meanwhile."""
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE, temporary_settings

    shutil.copy(empty_database(), directory / "prefect.db")
    with running_server(directory) as server, pytest.MonkeyPatch.context() as environment:
        for name, value in server.environment.items():
            environment.setenv(name, value)
        with temporary_settings(
            {
                PREFECT_API_URL: server.url,
                PREFECT_HOME: server.environment["PREFECT_HOME"],
                PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: False,
            }
        ):
            yield server


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """The Prefect server of the session."""
    with used_here(tmp_path_factory.mktemp("prefect")) as server:
        yield server


@pytest.fixture
def own_prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A Prefect server that knows nothing of other tests' flow runs."""
    _end_connections()
    with used_here(tmp_path_factory.mktemp("own-prefect")) as server:
        yield server
        _end_connections()


def _end_connections() -> None:
    # Prefect keeps them for as long as a process lives, whatever server its settings name by then.
    EventsWorker.drain_all()
    APILogWorker.drain_all()


@pytest.fixture
def prefect_api(prefect_server: PrefectServer) -> PrefectServer:
    """The Prefect server; the end of its log is shown where the test fails."""
    return prefect_server


@pytest.fixture
def api(prefect_api: PrefectServer) -> Iterator[SyncPrefectClient]:
    """A client of the Prefect server."""
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture(scope="session")
def local_pool(prefect_server: PrefectServer) -> Iterator[Any]:
    """Two Dask workers of one thread each: a warm pool that flow runs share."""
    import distributed

    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0", resources={"GPU": 1}
    ) as cluster:
        yield cluster


@pytest.fixture
def runner(local_pool: Any) -> Any:
    """A runner whose flow runs share that pool."""
    from prefect_htcdask import HTCDaskTaskRunner

    return HTCDaskTaskRunner(cluster=local_pool)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Show the server's log below the failure of a test that uses it."""
    report = yield
    server = getattr(item, "funcargs", {}).get("prefect_server") or getattr(item, "funcargs", {}).get("prefect_api")
    if report.failed and server is not None:
        report.sections.append(("Prefect server log", server.tail()))
    return report
