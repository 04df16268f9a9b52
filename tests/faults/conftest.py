"""Fixtures of the fault matrix: an arena of its own, and a row that is recorded whatever becomes of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prefect_htcdask.embedded import ensure_running, stop
from prefect_htcdask.settings import EmbeddedSettings
from tests.faults.arena import Arena
from tests.faults.flow_process import FlowProcess
from tests.faults.row import Row
from tests.support.pool_fixtures import log_tails
from tests.support.prefect_fixtures import PrefectServer

_row_key = pytest.StashKey[Row]()
_arena_key = pytest.StashKey[Arena]()


@pytest.fixture(scope="session")
def battered_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedSettings]:
    """A pool and gateway for the matrix alone: killing its daemons hurts nobody else.

    Not of the package: other files come between those of the matrix, which has so many processes as it has files.
    """
    settings = EmbeddedSettings(
        directory=str(tmp_path_factory.mktemp("battered")), idle_timeout=900, use_configured_pool=False
    )
    ensure_running(settings)
    yield settings
    stop(settings)


@pytest.fixture
def arena(
    battered_pool: EmbeddedSettings, prefect_server: PrefectServer, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Arena]:
    """The matrix's pool, gateway and Prefect server, all well and empty."""
    made = Arena(battered_pool, ensure_running(battered_pool), prefect_server, tmp_path)
    request.node.stash[_arena_key] = made
    made.clear()
    yield made
    made.clear()


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Iterator[Row]:
    """The record of this row; written whatever becomes of it."""
    fault = (request.function.__doc__ or "").strip().splitlines()[0]
    marked = getattr(request.node, "callspec", None)
    made = Row(request.node.name.removeprefix("test_"), fault + (f" [{marked.id}]" if marked else ""))
    request.node.stash[_row_key] = made
    started = time.monotonic()
    yield made
    made.seconds = time.monotonic() - started
    made.write()


@pytest.fixture
def new_flow(arena: Arena) -> Iterator[Callable[..., FlowProcess]]:
    """Makes flows of the matrix, which are ended with the test."""
    made: list[FlowProcess] = []

    def make(environment: dict[str, str] | None = None, **order: Any) -> FlowProcess:
        directory = arena.directory / f"flow{len(made)}"
        made.append(FlowProcess(directory, {**arena.environment, **(environment or {})}, **order))
        return made[-1]

    yield make
    for one in made:
        one.end()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Note in the row whether it was met; show what flow and daemons said below its failure."""
    report = yield
    row, arena = item.stash.get(_row_key, None), item.stash.get(_arena_key, None)
    if row is not None and report.when == "call":
        row.met = report.passed
        if report.skipped and call.excinfo is not None:
            row.not_run = str(call.excinfo.value)
        elif report.failed and not row.complaints and call.excinfo is not None:
            row.complaints.append(str(call.excinfo.value).splitlines()[0][:300])
    if arena is not None and report.failed:
        logs = [
            *arena.directory.glob("*.log"),
            *arena.directory.glob("flow*/flow.log"),
            *arena.runs.glob("*/supervisor.log"),
        ]
        report.sections += [(path.name, path.read_text(errors="replace")[-8000:]) for path in sorted(logs)]
        report.sections.extend(log_tails(arena.endpoint.directory))
    return report
