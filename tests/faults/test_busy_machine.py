"""The flow's machine has more to do than it can."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.faults.arena import Arena
from tests.faults.flow_process import FlowProcess
from tests.faults.row import Row, flow_message
from tests.support.waiting import PATIENCE

pytestmark = [pytest.mark.pool, pytest.mark.faults]

NewFlow = Callable[..., FlowProcess]


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that compute, while the block lasts."""
    command = [sys.executable, "-I", "-S", "-c", "while True: pass"]
    started = [subprocess.Popen(command, env={}) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def ours(directory: Path) -> list[psutil.Process]:
    """Living processes that have to do with a directory, by command line or environment, but for this one."""
    found = []
    for process in psutil.process_iter():
        try:
            told = [*process.cmdline(), *process.environ().values()]
            zombie = process.status() == psutil.STATUS_ZOMBIE
        except psutil.Error:
            continue
        if process.pid != os.getpid() and not zombie and any(str(directory) in text for text in told):
            found.append(process)
    return found


def test_more_processes_than_cores(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """three processes that compute on each core during a flow run: it completes, and nothing outlives its supervisor"""
    with busy(3 * len(os.sched_getaffinity(0))):
        flow = new_flow().start().compute()
        supervisor = flow.supervisor
        flow.let_go()
        row.expect(flow.wait(120) == 0, f"the flow failed: {flow_message(arena, flow)}")
        psutil.wait_procs([supervisor], timeout=120 * PATIENCE)
        left = [" ".join(process.cmdline()[:4]) for process in ours(arena.directory)]
        row.expect(not left, f"outlive the flow run: {left}")
        (summary,) = arena.runs.glob("*/summary.json")
        row.expect((summary.parent / "report.svg").exists(), "its picture is not there")
        row.gone(arena, flow.said("ended")["time"], 20, 20)
        row.judge(arena, [flow], ["Completed"], again=0)
    row.check()
