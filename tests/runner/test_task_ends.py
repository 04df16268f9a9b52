"""Task runs that are lost for good, or cancelled: no future waits for ever, and nothing stays Running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import distributed
import pytest
from prefect import flow, get_client, task
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.runtime import flow_run as flow_run_runtime

from prefect_htcdask import HTCDaskTaskRunner
from prefect_htcdask.errors import TaskRunLost
from prefect_htcdask.runner import flow_run
from prefect_htcdask.runner.futures.crash_reasons import REMEMBERED, JobOutcomes
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("prefect_api")


@task
def gated(directory: Path, name: str) -> str:
    """Leaves a mark each time that it runs, and runs until it is let go; says so when it is interrupted."""
    with (directory / name).open("a") as stream:
        stream.write(f"{os.getpid()}\n")
    try:
        while not (directory / f"{name}.go").exists():
            time.sleep(0.02)
    except BaseException:
        (directory / f"{name}.stopped").touch()
        raise
    return name


def runs(directory: Path, name: str) -> list[int]:
    path = directory / name
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def task_runs(flow_run_id: Any) -> list[Any]:
    with get_client(sync_client=True) as client:
        return client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])))


@pytest.fixture
def named_pool(tmp_path: Path) -> Iterator[str]:
    """A scheduler that gives a task up at the second lost worker.

    A worker is started for each file ``want-NAME``; what a flow refers to otherwise would travel with it.
    """
    with ExitStack() as stack:
        options = ["--scheduler-file", "s.json", "--no-dashboard"]

        def start(*arguments: str) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", *arguments, "--host", "127.0.0.1", *options],
                cwd=tmp_path,
                env={**os.environ, "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1"},
            )
            stack.callback(process.wait, 20)
            stack.callback(process.kill)
            return process

        start("scheduler", "--port", "0")
        wait_until((tmp_path / "s.json").exists, 30, "the scheduler is up")
        address = json.loads((tmp_path / "s.json").read_text())["address"]
        over = threading.Event()

        def serve() -> None:
            while not over.wait(0.1):
                for wish in tmp_path.glob("want-*"):
                    wish.unlink()
                    start("worker", "--no-nanny", "--nthreads", "1", "--name", wish.name.removeprefix("want-"))

        server = threading.Thread(target=serve)
        server.start()
        stack.callback(server.join)
        stack.callback(over.set)
        yield address


def job(what: str, job_id: str, reason: str, host: str | None = "slot1@node7") -> dict[str, Any]:
    """A message as the supervisor sends it."""
    return {"kind": "job", "what": what, "job_id": job_id, "host": host, "reason": reason}


def test_a_task_run_lost_too_often_names_the_jobs_and_what_became_of_them(named_pool: str, tmp_path: Path) -> None:
    ids: dict[str, Any] = {}

    @flow(task_runner=HTCDaskTaskRunner(address=named_pool))
    def computing() -> str:
        ids["flow"] = flow_run_runtime.id
        (tmp_path / "want-htcdask-12.0-1").touch()
        future = gated.submit(tmp_path, "long")
        run = flow_run.find(str(flow_run_runtime.id))
        assert run is not None
        (pid,) = wait_until(lambda: runs(tmp_path, "long"), 60, "it runs")
        (tmp_path / "want-htcdask-13.0-1").touch()
        run.on_message(job("started", "12.0", ""))
        os.kill(pid, signal.SIGKILL)
        run.on_message(job("held", "12.0", "held by HTCondor: memory usage exceeded (code 34.0)"))
        second = wait_until(lambda: runs(tmp_path, "long")[1:], 60, "it runs again")[0]
        os.kill(second, signal.SIGKILL)
        # The job event log tells of it later than the scheduler.
        late = threading.Timer(1.5, run.on_message, [job("removed", "13.0", "via condor_rm (by user ops)")])
        late.start()
        since = time.monotonic()
        with pytest.raises(TaskRunLost) as caught:
            future.result(timeout=60)
        assert time.monotonic() - since < 10
        assert future.state.is_crashed()
        raise caught.value

    state = computing(return_state=True)
    assert state.is_failed()
    (run,) = wait_until(
        lambda: [run for run in task_runs(ids["flow"]) if run.state_name == "Crashed"], 20, "it is Crashed"
    )
    for told in (state.message, run.state.message):
        assert "HTCondor job 13.0, removed: via condor_rm (by user ops)" in told.replace(" on slot1@node7", "")
        assert "HTCondor job 12.0 on slot1@node7, held by HTCondor: memory usage exceeded" in told


def test_the_last_word_on_a_job() -> None:
    job_outcomes = JobOutcomes()
    job_outcomes.take(job("started", "1.0", ""))
    assert not job_outcomes.is_known("htcdask-1.0-1")
    assert "not told yet" in job_outcomes.describe("htcdask-1.0-1")
    job_outcomes.take(job("evicted", "1.0", "preempted"))
    assert job_outcomes.describe("htcdask-1.0-1") == "HTCondor job 1.0 on slot1@node7, evicted: preempted"
    # It runs again: what ended its first start says nothing of the second.
    job_outcomes.take(job("started", "1.0", "", "slot2@node8"))
    assert not job_outcomes.is_known("htcdask-1.0-2")
    job_outcomes.take(job("exited", "1.0", "", "slot2@node8"))
    assert job_outcomes.describe("htcdask-1.0-2") == "HTCondor job 1.0 on slot2@node8, exited"
    # A worker that is none of our jobs is not waited for.
    assert job_outcomes.is_known("tcp://10.0.0.1:4711")
    for n in range(REMEMBERED + 10):
        job_outcomes.take(job("removed", f"2.{n}", "gone"))
    assert "not told yet" in job_outcomes.describe("htcdask-1.0-2")
    assert job_outcomes.is_known(f"htcdask-2.{REMEMBERED}-1")


def test_cancelling_a_flow_run_cancels_and_stops_its_task_runs(
    local_pool: distributed.LocalCluster, tmp_path: Path
) -> None:
    """As after a cancel from the UI, of which the supervisor tells; the flow's own code goes on meanwhile."""
    ids: dict[str, Any] = {}

    @flow(task_runner=HTCDaskTaskRunner(cluster=local_pool))
    def computing() -> str:
        ids["flow"] = flow_run_runtime.id
        running = [gated.submit(tmp_path, f"running-{n}") for n in range(2)]
        queued = [gated.submit(tmp_path, f"queued-{n}") for n in range(5)]
        wait_until(lambda: all(runs(tmp_path, f"running-{n}") for n in range(2)), 30, "two run")
        wait_until(lambda: _names(ids["flow"]) == ["Running"] * 2, 20, "Prefect knows")
        run = flow_run.find(str(flow_run_runtime.id))
        assert run is not None
        run.on_message({"kind": "flow_run_ended", "state": "CANCELLING"})
        for n in range(2):
            wait_until((tmp_path / f"running-{n}.stopped").exists, 10, "the functions have stopped")
        wait_until(lambda: _names(ids["flow"]) == ["Cancelled"] * 2, 15, "both are Cancelled")
        with pytest.raises(TaskRunLost, match="cancelled"):
            queued[0].result(timeout=10)
        with pytest.raises(TaskRunLost, match="cancelled"):
            running[0].result(timeout=10)
        assert running[0].state.is_cancelled()
        raise ValueError("over")

    assert computing(return_state=True).is_failed()
    # What its worker had said of it before, Crashed, has not come after that.
    assert _names(ids["flow"]) == ["Cancelled"] * 2
    assert not [name for name in (path.name for path in tmp_path.iterdir()) if name.startswith("queued")]

    @flow(task_runner=HTCDaskTaskRunner(cluster=local_pool))
    def afterwards() -> list[str]:
        for n in range(4):
            (tmp_path / f"after-{n}.go").touch()
        return gated.map([tmp_path] * 4, [f"after-{n}" for n in range(4)]).result(timeout=30)

    # The pool's threads are as good as before.
    assert afterwards() == [f"after-{n}" for n in range(4)]
    # Nobody cancelled it at the API, which has it as Failed; the look at it is over before the server goes.
    for thread in threading.enumerate():
        if thread.name == "htcdask-cancelled":
            thread.join(20)


def _names(flow_run_id: Any) -> list[str]:
    return sorted(str(run.state_name) for run in task_runs(flow_run_id))
