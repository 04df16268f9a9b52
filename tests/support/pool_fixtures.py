"""The real HTCondor pool and gateway that tests run against, and their logs where a test fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from prefect_htcdask.embedded import EmbeddedEndpoint, ensure_running, status, stop
from prefect_htcdask.embedded.state import StateDirectory
from prefect_htcdask.settings import EmbeddedSettings

LOGS = (
    "keeper.log",
    "gateway.log",
    "proxy.log",
    "condor/log/MasterLog",
    "condor/log/SchedLog",
    "condor/log/StartLog",
    "condor/log/ShadowLog",
    "condor/log/StarterLog*",
    "gateway/clusters/*/logs/*.log",
)
TAIL = 8_000
"""Bytes shown of each log."""

_endpoint_key = pytest.StashKey[EmbeddedEndpoint]()


@pytest.fixture(scope="session")
def embedded_settings(tmp_path_factory: pytest.TempPathFactory) -> EmbeddedSettings:
    """Settings of the session's own pool and gateway, which nobody else uses."""
    return EmbeddedSettings(
        directory=str(tmp_path_factory.mktemp("embedded")),
        # A safety net, should the test session be killed.
        idle_timeout=600,
        use_configured_pool=False,
    )


@pytest.fixture(scope="session")
def embedded(embedded_settings: EmbeddedSettings, pytestconfig: pytest.Config) -> Iterator[EmbeddedEndpoint]:
    """A personal HTCondor pool and a Dask Gateway, shared by the whole session and gone at its end."""
    endpoint = ensure_running(embedded_settings)
    pytestconfig.stash[_endpoint_key] = endpoint
    yield endpoint
    keeper = psutil.Process(status(embedded_settings)["keeper"])
    processes = [keeper, *keeper.children(recursive=True)]
    stop(embedded_settings)
    assert living(processes) == []


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Keep the session's pool while tests run that do not use it: the next that does has its address."""
    endpoint = item.config.stash.get(_endpoint_key, None)
    if endpoint is not None:
        StateDirectory(endpoint.directory).touch()


@pytest.fixture
def htcdask_environment(embedded: EmbeddedEndpoint, monkeypatch: pytest.MonkeyPatch) -> EmbeddedEndpoint:
    """The session's pool and gateway, found by the default settings, in this process and those that it starts."""
    prefix = "PREFECT_INTEGRATIONS_HTCDASK_EMBEDDED"
    monkeypatch.setenv(f"{prefix}_DIRECTORY", str(embedded.directory))
    monkeypatch.setenv(f"{prefix}_USE_CONFIGURED_POOL", "false")
    return embedded


def living(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those of `processes` that still run; a zombie does not."""
    return [process for process in processes if _lives(process)]


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it ended between the two questions
        return False


def log_tails(directory: Path) -> Iterator[tuple[str, str]]:
    """The last part of each daemon's log in a state directory, with its name."""
    for pattern in LOGS:
        for path in sorted(directory.glob(pattern)):
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - TAIL))
                yield str(path.relative_to(directory)), file.read().decode(errors="replace")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Show the daemons' logs below the failure of a test that uses them."""
    report = yield
    endpoint = item.config.stash.get(_endpoint_key, None)
    if report.failed and endpoint is not None and "embedded" in getattr(item, "fixturenames", ()):
        report.sections.extend(log_tails(endpoint.directory))
    return report
