"""What a worker asks of its kernel and its interpreter, in a process of its own."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import psutil
import pytest
from distributed.system_monitor import SystemMonitor

from prefect_htcdask.worker import process
from tests.support import time_slices

ASKING = """
import gc, os, subprocess, sys, threading
from prefect_htcdask.worker import process as worker_process
from tests.support.time_slices import slice_of_this_thread

before, after = (getattr(os, name) for name in sys.argv[1:])
os.sched_setscheduler(0, before, os.sched_param(0))
nice, thresholds = os.nice(3), gc.get_threshold()
worker_process.be_a_batch_process()
worker_process.collect_seldom()
found = []

def look():
    found.append([os.sched_getscheduler(0), slice_of_this_thread()])

look()
thread = threading.Thread(target=look)
thread.start()
thread.join()
child = "import os; from tests.support.time_slices import *; print([os.sched_getscheduler(0), slice_of_this_thread()])"
found.append(eval(subprocess.run([sys.executable, "-c", child], capture_output=True).stdout))
assert found == [[after, found[0][1]]] * 3, found
print(found[0][1])
assert os.nice(0) == nice
assert all(now == 3 * then for now, then in zip(gc.get_threshold(), thresholds, strict=True))
"""


@pytest.mark.parametrize(
    "before, after", [("SCHED_OTHER", "SCHED_BATCH"), ("SCHED_BATCH", "SCHED_BATCH"), ("SCHED_IDLE", "SCHED_IDLE")]
)
def test_an_ordinary_process_becomes_a_batch_process(before: str, after: str) -> None:
    """With the threads and processes that it starts, and with its slices; a site that gave it less still does."""
    done = subprocess.run(
        [sys.executable, "-c", ASKING, before, after], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    asks = before == "SCHED_OTHER" and time_slices.KNOWN
    assert (int(done.stdout) == 1e9 * process.SLICE) == asks, done.stdout


def test_one_that_may_not_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mock, since no sandbox that forbids the call can be had everywhere."""

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    process.be_a_batch_process()
    monkeypatch.delattr(os, "sched_setscheduler")
    process.be_a_batch_process()


@pytest.mark.parametrize("asked, ticks", [({}, 10), ({"DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL": "50ms"}, 20)])
def test_ticks_are_fewer_unless_somebody_has_said_how_many(asked: dict[str, str], ticks: int) -> None:
    """A second, of a real Dask server."""
    ticking = """
import asyncio
from distributed import Scheduler
from prefect_htcdask.worker import process as worker_process

async def main():
    worker_process.tick_seldom()
    async with Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0") as server:
        print(1000 / server.periodic_callbacks["tick"].callback_time)

asyncio.run(main())
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DASK_")} | asked
    done = subprocess.run(
        [sys.executable, "-c", ticking], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == ticks


def test_pages_of_mapped_files_are_no_memory_of_the_worker() -> None:
    size = 64 * 2**20
    worker = SimpleNamespace(monitor=SystemMonitor())
    with tempfile.TemporaryFile(dir="/var/tmp") as file:
        file.write(b"1" * size)
        file.flush()
        process.count_own_memory(worker)
        before = worker.monitor.get_process_memory()
        with mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapped:
            assert sum(mapped[at] for at in range(0, size, 4096)) > 0
            assert worker.monitor.update()["memory"] < before + size / 2
            assert psutil.Process().memory_info().rss > worker.monitor.get_process_memory() + size / 2
        block = b"1" * size
        assert worker.monitor.get_process_memory() > before + len(block) / 2
