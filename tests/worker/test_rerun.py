"""Task runs whose worker is lost: what runs again, what does not, and what Prefect's history tells of it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed
import pytest
from prefect import flow, get_client, task
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.runtime import flow_run as flow_run_runtime

from prefect_htcdask import HTCDaskTaskRunner
from tests.support.marked_tasks import after, gated, history, marked, runs
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("prefect_api")


@pytest.fixture
def pool() -> Iterator[distributed.LocalCluster]:
    """Two workers of one thread that a test may kill; each is started again."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0"
    ) as cluster:
        yield cluster


@task(persist_result=True)
def persisted(directory: Path, name: str) -> int:
    with (directory / name).open("a") as stream:
        stream.write(f"{os.getpid()}\n")
    return os.getpid()


def test_a_task_run_that_lost_its_worker_runs_again_under_its_own_history(
    pool: distributed.LocalCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids: dict[str, Any] = {}

    @flow(task_runner=HTCDaskTaskRunner(cluster=pool))
    def computing() -> str:
        ids["flow"] = flow_run_runtime.id
        future = gated.submit(tmp_path, "long")
        # Behind it on the same worker or the other: what has not begun is no rerun.
        others = [marked.submit(tmp_path, f"other-{n}") for n in range(3)]
        (pid,) = wait_until(lambda: runs(tmp_path, "long"), 30, "it runs")
        wait_until(lambda: _is_recorded(ids["flow"]), 20, "the API has heard of it")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(runs(tmp_path, "long")) == 2, 60, "it runs again")
        (tmp_path / "long.go").touch()
        for other in others:
            other.result(timeout=60)
        return future.result(timeout=60)

    assert computing() == "long"
    run, states = history(ids["flow"], "gated")
    assert [name for name, _ in states] == ["Pending", "Running", "AwaitingRetry", "Running", "Completed"]
    assert "lost with worker" in dict(states)["AwaitingRetry"]
    assert run.run_count == 2
    told = [record for record in caplog.records if f"{run.name}" in record.getMessage() and "runs again" in record.msg]
    assert [record.levelname for record in told] == ["WARNING"]


def _is_recorded(flow_run_id: Any) -> bool:
    with get_client(sync_client=True) as client:
        found = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])))
        return any(run.task_key.startswith("gated") and run.run_count for run in found)


@pytest.mark.parametrize("size", [0, 6 * 1024**2], ids=["small", "large"])
def test_a_collected_result_is_given_back_to_a_task_that_still_needs_it(
    pool: distributed.LocalCluster, tmp_path: Path, size: int
) -> None:
    """Submitted before the result was collected, the later task depends on it within Dask."""
    ids: dict[str, Any] = {}

    @flow(task_runner=HTCDaskTaskRunner(cluster=pool))
    def computing() -> tuple[int, tuple[int, bytes]]:
        ids["flow"] = flow_run_runtime.id
        gate = gated.submit(tmp_path, "gate")
        (gate_pid,) = wait_until(lambda: runs(tmp_path, "gate"), 30, "the gate runs")
        first = marked.submit(tmp_path, "first", size)
        late = after.submit(first, tmp_path, "late", wait_for=[gate])
        pid, data = first.result(timeout=30)
        assert pid != gate_pid and len(data) == size
        # Nobody but the task that needs it holds it now.
        del first
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not _lives(pid), 10, "its worker is gone")
        (tmp_path / "gate.go").touch()
        return pid, late.result(timeout=60)

    pid, (other, data) = computing()
    assert (other, len(data)) == (pid, size)
    assert runs(tmp_path, "first") == [pid]
    # Its worker may have died before it told Prefect: then the flow's process has.
    assert [name for name, _ in history(ids["flow"], "marked")[1]][-1] == "Completed"


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_persisted_result_is_read_again(pool: distributed.LocalCluster, tmp_path: Path) -> None:
    """Its worker died before anyone collected it, and its task run has a record in storage."""
    ids: dict[str, Any] = {}

    @flow(task_runner=HTCDaskTaskRunner(cluster=pool))
    def computing() -> tuple[int, int]:
        ids["flow"] = flow_run_runtime.id
        gate = gated.submit(tmp_path, "gate")
        wait_until(lambda: runs(tmp_path, "gate"), 30, "the gate runs")
        first = persisted.submit(tmp_path, "first")
        late = after.submit(first, tmp_path, "late", wait_for=[gate])
        (pid,) = wait_until(lambda: runs(tmp_path, "first"), 30, "it runs")
        history(ids["flow"], "persisted")
        os.kill(pid, signal.SIGKILL)
        (tmp_path / "gate.go").touch()
        return first.result(timeout=60), late.result(timeout=60)

    assert len(set(computing())) == 1
    assert len(runs(tmp_path, "first")) == 1
    run, states = history(ids["flow"], "persisted")
    assert [name for name, _ in states] == ["Pending", "Running", "Completed"]
    assert run.run_count == 1


def test_a_result_that_only_the_lost_worker_had_is_computed_again_and_the_log_says_so(
    pool: distributed.LocalCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids: dict[str, Any] = {}

    @flow(task_runner=HTCDaskTaskRunner(cluster=pool))
    def computing() -> tuple[int, bytes]:
        ids["flow"] = flow_run_runtime.id
        future = marked.submit(tmp_path, "first")
        history(ids["flow"], "marked")
        os.kill(*runs(tmp_path, "first"), signal.SIGKILL)
        wait_until(lambda: len(runs(tmp_path, "first")) == 2, 60, "it runs again")
        return future.result(timeout=60)

    assert computing()[0] == runs(tmp_path, "first")[1]
    run, states = history(ids["flow"], "marked")
    assert [name for name, _ in states] == ["Pending", "Running", "Completed", "AwaitingRetry", "Running", "Completed"]
    assert run.run_count == 2
    assert any(run.name in record.getMessage() and "computed again" in record.getMessage() for record in caplog.records)


def test_inputs_that_were_let_go_of_are_not_computed_again_either(
    pool: distributed.LocalCluster, tmp_path: Path
) -> None:
    """A chain: the last result is lost, Dask wants its input again, which was collected long ago."""

    @flow(task_runner=HTCDaskTaskRunner(cluster=pool))
    def computing() -> Any:
        gate = gated.submit(tmp_path, "gate")
        wait_until(lambda: runs(tmp_path, "gate"), 30, "the gate runs")
        first = marked.submit(tmp_path, "first")
        second = after.submit(first, tmp_path, "second")
        third = after.submit(second, tmp_path, "third", wait_for=[gate])
        pid, _ = first.result(timeout=30)
        wait_until((tmp_path / "second").exists, 30, "the second has run")
        time.sleep(2)
        (tmp_path / "second").unlink()
        os.kill(pid, signal.SIGKILL)
        wait_until((tmp_path / "second").exists, 60, "the second runs again")
        (tmp_path / "gate.go").touch()
        return pid, third.result(timeout=60)[0]

    pid, carried = computing()
    assert carried == pid
    assert runs(tmp_path, "first") == [pid]
