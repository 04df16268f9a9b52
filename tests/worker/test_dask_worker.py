"""A worker that is profiled, or interrupted, does not stand still: in processes of their own, since others would."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from prefect_htcdask.worker import cancellation

PROFILING = """
import asyncio, gc, sys, threading, time
from distributed import Client, Scheduler
from prefect_htcdask.worker.graceful_shutdown import HTCondorWorker

class Garbage:
    def __init__(self):
        self.me = self

    def __del__(self):
        time.sleep(0.0001)  # gives up the GIL

def starts_threads(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        thread = threading.Thread(target=Garbage)
        thread.start()
        thread.join()

async def main():
    async with Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0") as scheduler:
        async with (
            HTCondorWorker(scheduler.address, nthreads=1, host="127.0.0.1") as worker,
            Client(scheduler.address, asynchronous=True) as client,
        ):
            future = client.submit(starts_threads, 2.5)
            while not worker.active_threads and not future.done():
                await asyncio.sleep(0.01)
            assert worker.active_threads
            collects, look = [], sys._current_frames
            sys._current_frames = lambda: collects.append(gc.isenabled()) or look()
            worker.trigger_profile()
            assert list(worker.get_call_stack()) == [future.key]
            sys._current_frames = look
            assert collects == [sys.version_info >= (3, 12)] * 2
            usual = gc.get_threshold()
            gc.set_threshold(20)
            until = time.monotonic() + 2
            while time.monotonic() < until:
                worker.trigger_profile()
            gc.set_threshold(*usual)
            assert gc.isenabled()
            gc.disable()
            worker.trigger_profile()
            assert not gc.isenabled(), "whoever has disabled it finds it so"
            await future

asyncio.run(main())
"""


def test_a_collection_as_it_looks_at_its_threads_stops_nothing(tmp_path: Path) -> None:
    """With Python 3.11, distributed's own worker stands still for ever in many a run of the loop at the end."""
    script = tmp_path / "profiling.py"  # a file: the profiler looks for its lines
    script.write_text(PROFILING)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr


def test_only_a_thread_that_was_interrupted_is_rid_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's call is a stand-in: a real exception that is late cannot be had at will."""
    calls: list[Any] = []
    stand_in = type("Api", (), {"PyThreadState_SetAsyncExc": staticmethod(lambda _, exc: calls.append(exc))})
    monkeypatch.setattr(ctypes, "pythonapi", stand_in)
    with cancellation.interruptible("one"):
        assert cancellation.interrupt("another") == 0
    assert calls == []
    with cancellation.interruptible("one"):
        assert cancellation.interrupt("one") == 1
    assert len(calls) == 2 and calls[1] is None
    with cancellation.interruptible("one"):
        pass
    assert len(calls) == 2
    assert threading.get_ident() not in cancellation._running
