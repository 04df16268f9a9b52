"""What the Prefect UI has of a flow run: artifacts at a real server, and the files that are left beside the logs."""

from __future__ import annotations

import contextvars
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow, task
from prefect.runtime import flow_run as flow_run_runtime
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_htcdask import HTCDaskTaskRunner
from prefect_htcdask.condor.schedd import ScheddClient
from prefect_htcdask.condor.submit_description import cluster_digest
from prefect_htcdask.embedded import EmbeddedEndpoint
from prefect_htcdask.runner import flow_run
from prefect_htcdask.runner.ui.artifact_contents import jobs, progress
from prefect_htcdask.runner.ui.artifacts import Artifacts, artifact_key
from prefect_htcdask.utils.prefect_client import TIMEOUT
from tests.support.artifacts import artifacts_of, message
from tests.support.cluster_fixtures import SMALL, jobs_of
from tests.support.plain_flow import PlainFlow
from tests.support.prefect_fixtures import PrefectServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("prefect_api")


class Counter:
    """An HTTP proxy in front of the API that notes when artifacts were written, and may let nothing through."""

    def __init__(self, server: str) -> None:
        self.calls: list[float] = []
        self.swallowed = 0
        self.stuck = threading.Event()
        host, _, port = server.removeprefix("http://").removesuffix("/api").rpartition(":")
        self._server = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/api"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                one, _ = self._listener.accept()
                other = socket.create_connection(self._server)
            except OSError:
                return
            threading.Thread(target=self._pass_on, args=(one, other, True), daemon=True).start()
            threading.Thread(target=self._pass_on, args=(other, one, False), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, is_request: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                if is_request and b" /api/artifacts/" in data.split(b"\r\n", 1)[0]:
                    self.calls.append(time.monotonic())
                if self.stuck.is_set():
                    self.swallowed += is_request
                    continue
                target.sendall(data)
        except OSError:
            pass
        finally:
            source.close()
            target.close()

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def counter(prefect_server: PrefectServer) -> Iterator[Counter]:
    one = Counter(prefect_server.url)
    yield one
    one.close()


@pytest.fixture
def behind(counter: Counter) -> contextvars.Context:
    """A context in which the API is behind the counter; the test itself asks the server."""
    with temporary_settings({PREFECT_API_URL: counter.url}):
        return contextvars.copy_context()


def started(
    flow_run_id: UUID, context: contextvars.Context, log: list[str], interval: float = 1.0, timeout: float = TIMEOUT
) -> Artifacts:
    return Artifacts(
        flow_run_id,
        "Dimuon analysis",
        "http://gateway.example.org/status",
        interval,
        lambda summary: f"# report\n\n{summary['jobs']} jobs",
        context,
        lambda level, text: log.append(f"{level}: {text}"),
        timeout,
    )


def test_thousands_of_jobs_cost_one_call_in_each_interval(
    flow_run_id: UUID, counter: Counter, behind: contextvars.Context
) -> None:
    log: list[str] = []
    artifacts = started(flow_run_id, behind, log)
    took = 0.0
    begun = time.monotonic()
    number = 0
    while time.monotonic() - begun < 5:
        number += 1
        before = time.monotonic()
        artifacts.take(message(number, jobs=5000))
        took = max(took, time.monotonic() - before)
        time.sleep(0.001)
    calls = list(counter.calls)
    assert number > 500 and 4 <= len(calls) <= 6, (number, len(calls))
    assert min(later - earlier for earlier, later in pairwise(calls)) > 0.9
    assert took < 0.5, "the flow's side waits for no call"
    last = message(number, jobs=5000)
    artifacts.finish({"jobs": 5000, "report": last})
    artifacts.close()
    assert len(counter.calls) - len(calls) <= 5, "at the end one for each artifact"
    assert log == []

    found = artifacts_of(flow_run_id)
    assert set(found) == {
        f"dimuon-analysis-{name}" for name in ("dask-dashboard", "task-progress", "htcondor-jobs", "htcondor-report")
    }
    assert "is over" in found["dimuon-analysis-dask-dashboard"]["data"]
    assert found["dimuon-analysis-task-progress"]["data"] == round(number / 100, 1)
    table = found["dimuon-analysis-htcondor-jobs"]
    assert len(json.loads(table["data"])) == 50 and "4,950 more are not" in table["description"]
    assert found["dimuon-analysis-htcondor-report"]["data"].startswith("# report\n\n5000 jobs")


def test_an_api_that_does_not_answer_is_told_once_and_waited_for_by_nobody(
    flow_run_id: UUID, counter: Counter, behind: contextvars.Context
) -> None:
    counter.stuck.set()
    log: list[str] = []
    artifacts = started(flow_run_id, behind, log, interval=0.2, timeout=0.5)
    wait_until(lambda: counter.swallowed > 2, 20, "it is tried again")
    begun = time.monotonic()
    artifacts.take(message(1))
    artifacts.finish({"jobs": 1, "report": message(1)})
    assert time.monotonic() - begun < 0.1
    artifacts.close()
    assert time.monotonic() - begun < 2
    (told,) = log
    assert told.startswith("warning: ") and "artifacts could not be written" in told
    assert artifacts_of(flow_run_id) == {}


def test_an_api_that_comes_back_gets_the_latest(
    flow_run_id: UUID, counter: Counter, behind: contextvars.Context
) -> None:
    counter.stuck.set()
    log: list[str] = []
    artifacts = started(flow_run_id, behind, log, interval=0.2, timeout=0.5)
    artifacts.take(message(1))
    wait_until(lambda: log, 20, "it is told")
    # With an API that answers, a busy machine takes longer.
    artifacts.timeout = TIMEOUT
    counter.stuck.clear()
    artifacts.take(message(7000))
    found = wait_until(
        lambda: one if (one := artifacts_of(flow_run_id).get("dimuon-analysis-task-progress")) else None, 20, "progress"
    )
    assert found["data"] == 70.0
    artifacts.finish({})
    artifacts.close()
    assert len(log) == 1
    assert "is over" in artifacts_of(flow_run_id)["dimuon-analysis-dask-dashboard"]["data"]


def test_keys_are_what_prefect_takes() -> None:
    assert artifact_key("Dimuon analysis (2026)", "x") == "dimuon-analysis-2026-x"
    assert artifact_key("???", "x") == "flow-x"


def test_what_there_is_nothing_of_yet() -> None:
    nothing = {"tasks": {"done": 0, "known": 0}, "queued": 0, "workers": {}, "states": {}, "jobs": []}
    assert jobs(nothing) is None and progress(nothing).data == 0.0


# With a pool


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Where the clusters' directories are (`condor_environment`)."""
    return tmp_path / "runs"


def run_directory(runs: Path) -> Path:
    (directory,) = (path.parent for path in runs.glob("*/jobs.log"))
    return directory


@task
def work(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


@pytest.mark.pool
@pytest.mark.timeout(240)
def test_a_flow_run_has_its_artifacts_while_it_runs_and_a_report_at_its_end(
    condor_environment: EmbeddedEndpoint, queue: ScheddClient, runs: Path
) -> None:
    @flow(name="Watched", task_runner=HTCDaskTaskRunner(worker=SMALL, adapt_kwargs={"maximum": 2}))
    def computing() -> Any:
        slow = work.submit(25)
        work.map([0.3] * 10).result()
        run = flow_run.find(str(flow_run_runtime.id))
        assert run is not None
        dashboard = run.client.dashboard_link
        keys = {f"watched-{name}" for name in ("dask-dashboard", "task-progress", "htcondor-jobs")}
        found = wait_until(
            lambda: one if set(one := artifacts_of(flow_run_runtime.id)) == keys else None, 40, "artifacts"
        )
        slow.wait()
        return flow_run_runtime.id, dashboard, found

    flow_run_id, dashboard, during = computing()
    assert dashboard in during["watched-dask-dashboard"]["data"]
    assert 0 <= during["watched-task-progress"]["data"] <= 100
    assert "running" in during["watched-htcondor-jobs"]["description"]

    found = artifacts_of(flow_run_id)
    assert "is over" in found["watched-dask-dashboard"]["data"]
    assert found["watched-task-progress"]["data"] == 100.0
    assert found["watched-task-progress"]["description"].startswith("11 of 11 tasks")
    rows = json.loads(found["watched-htcondor-jobs"]["data"])
    assert 1 <= len(rows) <= 3
    for row in rows:
        assert row["host"] and row["start (UTC)"] and row["hold reason, or how it ended"] == ""
        assert row["peak memory"].endswith("of 300 MiB")
    assert any(float(row["core-hours"]) > 20 / 3600 for row in rows)
    report = found["watched-htcondor-report"]
    assert report["type"] == "markdown" and report["data"].startswith("# Watched / ")
    for words in (
        "| Tasks | 11 ended of 11 known",
        "```mermaid",
        "xychart",
        "## What to change",
        "Queue wait | median",
    ):
        assert words in report["data"], report["data"]

    # The same is kept beside the logs, and a finer picture.
    directory = run_directory(runs)
    assert (directory / "report.md").read_text() == report["data"]
    numbers = json.loads((directory / "summary.json").read_text())["report"]
    (group,) = numbers["groups"].values()
    assert 28 <= group["task_seconds"] < 60 and group["done"] == 11
    assert group["worker_seconds"] >= group["task_seconds"]
    assert all((directory / name).stat().st_mode & 0o077 == 0 for name in ("report.md", "summary.json", "report.svg"))
    wait_until(lambda: jobs_of(queue) == [], 30, "no job left")


@pytest.mark.pool
@pytest.mark.timeout(240)
def test_a_failed_flow_has_its_report_and_one_that_wants_none_has_nothing(
    condor_environment: EmbeddedEndpoint, runs: Path
) -> None:
    ids: list[Any] = []

    @flow(name="Failing", task_runner=HTCDaskTaskRunner(worker=SMALL, adapt_kwargs={"maximum": 1}))
    def failing() -> None:
        ids.append(flow_run_runtime.id)
        work.submit(0.1).result()
        raise ArithmeticError("as it happens")

    with pytest.raises(ArithmeticError):
        failing()
    found = artifacts_of(ids[0])
    assert "| Tasks | 1 ended of 1 known" in found["failing-htcondor-report"]["data"]
    run_directory(runs)
    assert (run_directory(runs) / "report.md").exists()

    quiet = failing.with_options(
        task_runner=HTCDaskTaskRunner(worker=SMALL, adapt_kwargs={"maximum": 1}, report={"enabled": False})
    )
    before = set(runs.glob("*/jobs.log"))
    with pytest.raises(ArithmeticError):
        quiet()
    assert artifacts_of(ids[1]) == {}
    (log,) = set(runs.glob("*/jobs.log")) - before
    assert not (log.parent / "report.md").exists() and not (log.parent / "summary.json").exists()


@pytest.mark.pool
@pytest.mark.timeout(240)
def test_a_killed_flow_leaves_its_report_as_files(
    condor_environment: EmbeddedEndpoint, queue: ScheddClient, tmp_path: Path, runs: Path
) -> None:
    one = PlainFlow(tmp_path, "killed")
    try:
        one.wait_until_it_computes()
        one.process.kill()
        summary = runs / cluster_digest(one.cluster) / "summary.json"
        wait_until(summary.exists, 30, "the supervisor's summary")
        wait_until((summary.parent / "report.md").exists, 10, "the report")
        told = json.loads(summary.read_text())
        assert told["report"]["ended_because"] == "the flow's process is gone"
        assert told["jobs"] == 1
    finally:
        one.end()
    wait_until(lambda: jobs_of(queue) == [], 30, "no job left")
