"""The Prefect API is away while a flow runs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.arena import Arena
from tests.faults.flow_process import FlowProcess
from tests.faults.row import Row
from tools.prefect_server import free_port, prefect_server

pytestmark = [pytest.mark.pool, pytest.mark.faults, pytest.mark.faults_long]

NewFlow = Callable[..., FlowProcess]
AWAY = 30.0


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
