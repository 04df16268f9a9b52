"""What a worker asks of its interpreter and of Dask, in a process of its own."""

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

COLLECTING = """
import gc
from prefect_htcdask.worker import process as worker_process
thresholds = gc.get_threshold()
worker_process.collect_seldom()
assert all(now == 3 * then for now, then in zip(gc.get_threshold(), thresholds, strict=True))
"""


def test_garbage_is_collected_as_seldom_as_by_dask_worker() -> None:
    subprocess.run([sys.executable, "-c", COLLECTING], timeout=60, check=True)


PRINTING = """
import logging
from prefect_htcdask.worker import process as worker_process

worker_process.log_without_colours()
import prefect.main
print(*(type(handler.console.highlighter).__name__ for handler in logging.root.handlers))
"""


@pytest.mark.parametrize(
    "asked, highlighter", [({}, "NullHighlighter"), ({"PREFECT_LOGGING_COLORS": "true"}, "PrefectConsoleHighlighter")]
)
def test_a_log_is_not_searched_for_words_to_colour(asked: dict[str, str], highlighter: str) -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_LOGGING_")}
    environment = plain | asked
    done = subprocess.run(
        [sys.executable, "-c", PRINTING], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == highlighter


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
