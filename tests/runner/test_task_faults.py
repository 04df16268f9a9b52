"""Ends that are not the happy one: every task run reaches a final state, and no future waits for ever."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed
import pytest
from prefect import flow, get_client, task
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import StateType
from prefect.runtime import flow_run as flow_run_runtime

from prefect_htcdask import HTCDaskError, HTCDaskTaskRunner
from prefect_htcdask.errors import TaskRunLost
from prefect_htcdask.runner import flow_run

pytestmark = pytest.mark.usefixtures("prefect_api")


@pytest.fixture
def frail_pool() -> Iterator[distributed.LocalCluster]:
    """Two workers that a test may kill; a task is lost with the first worker that dies with it."""
    import dask

    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0"
        ) as cluster,
    ):
        yield cluster


@task
def double(x: int) -> int:
    return 2 * x


@task
def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@task
def announce_and_sleep(path: Path, seconds: float) -> None:
    path.write_text(str(os.getpid()))
    time.sleep(seconds)


def _pid_in(path: Path) -> int:
    _until(lambda: path.exists() and path.read_text() != "")
    return int(path.read_text())


def _until(condition: Any, timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def _states(flow_run_id: Any, timeout: float = 20, settled: Any = None) -> dict[str, list[StateType]]:
    """The final states of a flow run's task runs by name, once none is unfinished."""
    deadline = time.monotonic() + timeout
    with get_client(sync_client=True) as client:
        while True:
            runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])))
            found: dict[str, list[StateType]] = {}
            for run in runs:
                found.setdefault(run.task_key.partition("-")[0], []).append(run.state_type)
            if all(run.state is not None and run.state.is_final() for run in runs) and (
                settled is None or settled(found)
            ):
                return found
            assert time.monotonic() < deadline, [(run.name, run.state) for run in runs]
            time.sleep(0.2)


def test_a_killed_worker_crashes_the_task_run(frail_pool: distributed.LocalCluster, tmp_path: Path) -> None:
    ids: dict[str, Any] = {}

    @flow(task_runner=HTCDaskTaskRunner(cluster=frail_pool))
    def computing() -> Any:
        ids["flow"] = flow_run_runtime.id
        victim = announce_and_sleep.submit(tmp_path / "pid", 60)
        after = double.submit(3, wait_for=[victim])
        fine = double.submit(4)
        os.kill(_pid_in(tmp_path / "pid"), signal.SIGKILL)
        with pytest.raises(TaskRunLost, match="worker"):
            victim.result(timeout=60)
        assert victim.state.is_crashed()
        after.wait(timeout=30)
        assert not after.state.is_completed()
        assert fine.result(timeout=60) == 8
        return victim

    state = computing(return_state=True)
    assert state.is_failed() or state.is_crashed()
    found = _states(ids["flow"], settled=lambda found: "announce_and_sleep" in found)
    assert found["announce_and_sleep"] == [StateType.CRASHED]
    assert found["double"].count(StateType.COMPLETED) == 1


def test_a_lost_task_run_that_nobody_waits_for(frail_pool: distributed.LocalCluster, tmp_path: Path) -> None:
    ids: dict[str, Any] = {}

    @flow(task_runner=HTCDaskTaskRunner(cluster=frail_pool))
    def computing() -> None:
        ids["flow"] = flow_run_runtime.id
        announce_and_sleep.submit(tmp_path / "pid", 60)
        os.kill(_pid_in(tmp_path / "pid"), signal.SIGKILL)
        nap.submit(3).result()

    computing()
    found = _states(ids["flow"], settled=lambda found: "announce_and_sleep" in found)
    assert found["announce_and_sleep"] == [StateType.CRASHED]


def test_a_collected_result_is_not_computed_again(frail_pool: distributed.LocalCluster, tmp_path: Path) -> None:
    @task
    def counted() -> int:
        with (tmp_path / "runs").open("a") as file:
            file.write("x")
        return os.getpid()

    @flow(task_runner=HTCDaskTaskRunner(cluster=frail_pool))
    def computing() -> Any:
        first = counted.submit()
        os.kill(first.result(), signal.SIGKILL)
        time.sleep(1)
        return double.submit(first).result(timeout=60) == 2 * first.result()

    assert computing()
    assert (tmp_path / "runs").read_text() == "x"


def test_the_scheduler_is_lost(tmp_path: Path) -> None:
    import subprocess
    import sys

    options = ["--host", "127.0.0.1", "--scheduler-file", "s.json", "--no-dashboard"]
    scheduler = subprocess.Popen(
        [sys.executable, "-m", "dask", "scheduler", "--port", "0", *options],
        cwd=tmp_path,
    )
    worker = None
    try:
        _until(lambda: (tmp_path / "s.json").exists())
        worker = subprocess.Popen(
            [sys.executable, "-m", "dask", "worker", "--nthreads", "1", *options],
            cwd=tmp_path,
        )
        import json

        address = json.loads((tmp_path / "s.json").read_text())["address"]

        # Not the process itself: the flow travels to the workers.
        lost = scheduler.pid

        @flow(task_runner=HTCDaskTaskRunner(address=address, client_kwargs={"timeout": "8 s"}))
        def computing() -> None:
            sleeping = announce_and_sleep.submit(tmp_path / "pid", 60)
            queued = double.map([1, 2, 3])
            _pid_in(tmp_path / "pid")
            os.kill(lost, signal.SIGKILL)
            with pytest.raises(TaskRunLost):
                sleeping.result(timeout=60)
            with pytest.raises(TaskRunLost):
                queued.result(timeout=60)
            raise sleeping.state.data

        state = computing(return_state=True)
        assert state.is_failed()
        assert "connection to the Dask scheduler" in state.message and "within 8 s" in state.message
    finally:
        for process in (scheduler, worker):
            if process is not None:
                process.kill()
                process.wait(20)


def test_unawaited_futures_end(local_pool: distributed.LocalCluster) -> None:
    ids: dict[str, Any] = {}

    @flow(task_runner=HTCDaskTaskRunner(cluster=local_pool))
    def computing() -> str:
        ids["flow"] = flow_run_runtime.id
        double.map([1, 2]).wait()
        # The workers have imported Prefect by now.
        ids["started"] = time.monotonic()
        for _ in range(8):
            # Two run; the rest is queued behind them when the flow ends.
            ids["last"] = nap.submit(2)
        time.sleep(1)
        return "done"

    assert computing() == "done"
    assert time.monotonic() - ids["started"] < 15
    found = _states(ids["flow"])
    assert 1 <= found["nap"].count(StateType.COMPLETED) == len(found["nap"]) < 8
    assert ids["last"].state.is_cancelled()


def test_a_dropped_future_does_not_drop_its_task(local_pool: distributed.LocalCluster, tmp_path: Path) -> None:
    @task
    def touch(index: int) -> None:
        (tmp_path / str(index)).touch()

    @flow(task_runner=HTCDaskTaskRunner(cluster=local_pool))
    def computing() -> None:
        for index in range(20):
            touch.submit(index)
        _until(lambda: len(list(tmp_path.iterdir())) == 20)

    computing()


def test_exits_inside_a_task_crash_it_alone(local_pool: distributed.LocalCluster) -> None:
    @task
    def leave() -> None:
        raise SystemExit(3)

    @flow(task_runner=HTCDaskTaskRunner(cluster=local_pool))
    def computing() -> Any:
        future = leave.submit()
        future.wait(timeout=30)
        return future.state.type, double.submit(1).result(timeout=30)

    assert computing() == (StateType.CRASHED, 2)


def test_a_failed_cluster_fails_the_flow(local_pool: distributed.LocalCluster) -> None:
    ids: dict[str, Any] = {}

    @flow(task_runner=HTCDaskTaskRunner(cluster=local_pool))
    def computing() -> None:
        ids["flow"] = flow_run_runtime.id
        future = nap.submit(3)
        run = flow_run.find(str(flow_run_runtime.id))
        assert run is not None
        threading.Timer(0.5, run.on_message, [{"kind": "failed", "text": "300 jobs wait, none starts"}]).start()
        with pytest.raises(HTCDaskError, match="300 jobs wait"):
            future.result(timeout=30)
        with pytest.raises(HTCDaskError, match="300 jobs wait"):
            nap.submit(0)
        future.result()

    state = computing(return_state=True)
    assert state.is_failed()
    assert "300 jobs wait" in state.message
    _states(ids["flow"])


def test_messages_become_logs(local_pool: distributed.LocalCluster, caplog: pytest.LogCaptureFixture) -> None:
    @flow(task_runner=HTCDaskTaskRunner(cluster=local_pool))
    def computing() -> None:
        double.submit(1).wait()
        run = flow_run.find(str(flow_run_runtime.id))
        assert run is not None
        run.on_message({"kind": "log", "level": "warning", "text": "job 12.0 is held: no such file"})

    computing()
    assert any("job 12.0 is held" in record.message and record.levelname == "WARNING" for record in caplog.records)


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit, ValueError])
def test_the_registry_is_empty_afterwards(local_pool: distributed.LocalCluster, ending: type[BaseException]) -> None:
    ids: dict[str, Any] = {}

    @flow(task_runner=HTCDaskTaskRunner(cluster=local_pool))
    def computing() -> None:
        ids["flow"] = flow_run_runtime.id
        nap.submit(1)
        nap.submit(4)
        double.submit(1)
        _until(lambda: flow_run.find(str(ids["flow"])) is not None)
        time.sleep(0.5)
        raise ending("the end")

    started = time.monotonic()
    with pytest.raises(ending):
        computing()
    assert flow_run.find(str(ids["flow"])) is None
    assert time.monotonic() - started < 15
    _states(ids["flow"])


def test_cancel_all_on_the_original_reaches_the_duplicate(local_pool: distributed.LocalCluster) -> None:
    runner = HTCDaskTaskRunner(cluster=local_pool)

    @flow(task_runner=runner)
    def computing() -> None:
        futures = [nap.submit(5) for _ in range(6)]
        threading.Timer(0.5, lambda: None).start()
        time.sleep(0.5)
        runner.cancel_all()
        with pytest.raises(Exception, match="cancel"):
            futures[-1].result(timeout=30)
        raise ValueError("cancelled")

    assert computing(return_state=True).is_failed()
