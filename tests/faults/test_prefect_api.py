"""The Prefect API is away while a flow runs."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefect_htcdask.embedded.ports import free_port
from tests.faults.arena import Arena, kill
from tests.faults.flow_process import FlowProcess
from tests.faults.row import Row
from tests.support.waiting import wait_until
from tools.prefect_server import prefect_server

pytestmark = [pytest.mark.pool, pytest.mark.faults, pytest.mark.faults_long]

NewFlow = Callable[..., FlowProcess]
AWAY = 30.0
LATER = 90.0
"""Seconds by which a flow may end later than one with Prefect's own task runner. Prefect's engine tries for more than a
minute to reach an API that is away, and so do its logs for each batch of lines; ours has more to say as it ends."""

STOCK = """
import sys, time
from pathlib import Path
from prefect import flow, get_run_logger, task

@task
def gated():
    get_run_logger().info("its log has been in touch with the API when it goes away")
    time.sleep(5)
    Path(sys.argv[1]).touch()
    while True:
        time.sleep(0.05)

@flow
def stock():
    gated()

stock()
"""

StockFlow = Callable[[dict[str, str]], "subprocess.Popen[bytes]"]


@pytest.fixture
def stock_flow(tmp_path: Path) -> Iterator[StockFlow]:
    """Starts a flow that is none of ours; its task runs when that returns."""
    started: list[subprocess.Popen[bytes]] = []

    def start(environment: dict[str, str]) -> subprocess.Popen[bytes]:
        script, runs = tmp_path / "stock.py", tmp_path / "stock.runs"
        script.write_text(STOCK)
        with (tmp_path / "stock.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, str(script), str(runs)],
                env={**os.environ, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started.append(process)
        wait_until(runs.exists, 90, "its task runs")
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(10)


@pytest.mark.parametrize("tasks_end", ["meanwhile", "later"])
def test_api_down(tasks_end: str, arena: Arena, row: Row, new_flow: NewFlow, tmp_path: Path) -> None:
    """Prefect API down for 30 s mid-flow; its tasks end meanwhile, or later"""
    port = free_port()
    with prefect_server(tmp_path / "server", port=port) as server:
        flow = new_flow(server.environment).start().compute()
        jobs = arena.job_ids()
    if tasks_end == "meanwhile":
        flow.let_go()
    time.sleep(AWAY)  # the fault itself
    if tasks_end == "later":
        row.expect(arena.job_ids() == jobs, "workers were lost by an outage of the API")
    with prefect_server(tmp_path / "server", port=port) as server:
        back = time.time()
        flow.let_go()
        row.expect(flow.wait(150) == 0, f"the flow failed: {flow.tail(8)}")
        row.gone(arena, max(flow.said("ended")["time"], back), 60, 60)
        row.judge(dataclasses.replace(arena, server=server), [flow], ["Completed"], again=0)
    row.check()


@pytest.mark.timeout(600)
def test_api_down_as_the_flow_is_interrupted(
    arena: Arena, row: Row, new_flow: NewFlow, tmp_path: Path, stock_flow: StockFlow
) -> None:
    """SIGTERM while the Prefect API is down for good: the workers go at once, the process as soon as a stock one"""
    port = free_port()
    with prefect_server(tmp_path / "server", port=port) as server:
        flow = new_flow(server.environment).start().compute()
        stock = stock_flow(server.environment)
    since = time.time()
    kill(flow.pid, stock.pid, number=signal.SIGTERM)
    row.gone(arena, since, 40, 40)
    assert flow.process is not None
    processes = [flow.process, stock]
    took: dict[int, float] = {}

    def look() -> bool:
        for process in processes:
            if process.poll() is not None:
                took.setdefault(process.pid, time.time() - since)
        return len(took) == len(processes)

    wait_until(look, 300, "both processes have ended")
    ours, theirs = (took[process.pid] for process in processes)
    row.expect(flow.process.returncode != 0, f"the flow ended well: {flow.tail(8)}")
    row.note = f"its process ended after {ours:.0f} s, that of a flow with threads after {theirs:.0f} s"
    row.expect(ours < theirs + LATER, row.note)
    with prefect_server(tmp_path / "server", port=port) as server:
        # Nobody could be told: the sweep finds it.
        row.judge(dataclasses.replace(arena, server=server), [flow], ["Crashed"], again=0, sweep=True)
    row.check()
