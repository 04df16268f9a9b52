"""An evicted worker sends off what it has to tell Prefect, tried with a real server and condor_vacate_job's action."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from distributed import get_worker
from prefect import flow, get_client, get_run_logger, task
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, LogFilter, LogFilterFlowRunId
from prefect.runtime import flow_run as flow_run_runtime
from prefect.runtime import task_run as task_run_runtime

from prefect_htcdask import HTCDaskTaskRunner
from prefect_htcdask.condor.schedd import ScheddClient
from prefect_htcdask.embedded import EmbeddedEndpoint
from tests.support.cluster_fixtures import SMALL, Stopwatch
from tests.support.vacating import vacate
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.pool, pytest.mark.usefixtures("htcdask_environment", "prefect_api")]

LINES = 40


@task
def talkative(name: str) -> dict[str, Any]:
    """Has much to say, and ends at once; tells on which worker, and below which process of the job."""
    for n in range(LINES):
        get_run_logger().info(f"{name} says {n}")
    return {"worker": str(get_worker().name), "guard": os.getppid()}


@task
def gated(directory: Path, name: str) -> int:
    """Has much to say, then runs until it is let go; returns how often it was begun."""
    for n in range(LINES):
        get_run_logger().info(f"{name} says {n}")
    with (directory / name).open("a") as stream:
        stream.write(f"{get_worker().name} {os.getppid()}\n")
    while not (directory / f"{name}.go").exists():
        time.sleep(0.05)
    return int(task_run_runtime.run_count)


def lines_of(flow_run_id: Any, name: str) -> set[str]:
    """What a task has said, as far as the server knows."""
    found: set[str] = set()
    with get_client(sync_client=True) as client:
        only = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id]))
        offset = 0
        while page := client.read_logs(log_filter=only, limit=200, offset=offset):
            found.update(log.message for log in page)
            offset += len(page)
    return {line for line in found if line.startswith(f"{name} says ")}


def states(flow_run_id: Any) -> list[tuple[str, int]]:
    """State and run count of the flow run's task runs."""
    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])))
    return sorted((str(run.state_name), run.run_count) for run in runs)


def exit_status(endpoint: EmbeddedEndpoint, guard: int) -> int | None:
    """The status with which a job's process ended, as its starter saw it; an evicted job's ad does not tell."""
    for log in (endpoint.directory / "condor" / "log").glob("StarterLog.slot*"):
        if found := re.search(rf"Process exited, pid={guard}, (status|signal)=(\d+)", log.read_text(errors="replace")):
            return int(found[2]) if found[1] == "status" else -int(found[2])
    return None


def test_states_and_logs_of_an_evicted_worker_arrive_and_its_job_exits_0(
    queue: ScheddClient, embedded: EmbeddedEndpoint, tmp_path: Path
) -> None:
    @flow(task_runner=HTCDaskTaskRunner(worker=SMALL, adapt_kwargs={"minimum": 0, "maximum": 1}))
    def computing() -> tuple[int, list[int]]:
        flow_run_id = flow_run_runtime.id
        talkative.submit("first").result(timeout=90)
        last = [future.result(timeout=60) for future in talkative.map(["a", "b", "c"])][-1]
        vacate(queue, last["worker"])
        watch = Stopwatch()
        idle = wait_until(lambda: exit_status(embedded, last["guard"]) is not None, 30, "the worker's job has ended")
        assert idle and exit_status(embedded, last["guard"]) == 0
        print(f"an idle worker was gone {watch():.1f} s after its eviction")
        for name in ("first", "a", "b", "c"):
            wait_until(lambda name=name: len(lines_of(flow_run_id, name)) == LINES, 10, f"all that {name} said")
        wait_until(lambda: states(flow_run_id) == [("Completed", 1)] * 4, 10, "all have ended")

        long = gated.submit(tmp_path, "long")
        worker, guard = wait_until(lambda: marks(tmp_path / "long"), 90, "it runs")[0]
        vacate(queue, worker)
        watch = Stopwatch()
        wait_until(lambda: exit_status(embedded, int(guard)) is not None, 30, "the busy worker's job has ended")
        assert exit_status(embedded, int(guard)) == 0
        print(f"a busy worker was gone {watch():.1f} s after its eviction")
        wait_until(lambda: len(lines_of(flow_run_id, "long")) == LINES, 10, "all that it said before")
        (tmp_path / "long.go").touch()
        return long.result(timeout=120), [len(marks(tmp_path / "long"))]

    # It was begun twice, and Prefect's count tells of it.
    assert computing() == (2, [2])


def marks(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []
