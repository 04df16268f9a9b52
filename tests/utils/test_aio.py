"""Threads of ours that go on as the interpreter ends: what they have to tell Prefect comes too late, and quietly."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap

from prefect_htcdask.utils.aio import interpreter_ends

LATE = """
    import contextvars, logging, os, threading, uuid
    os.environ["PREFECT_API_URL"] = "http://127.0.0.1:9/api"
    from types import SimpleNamespace
    from prefect import task
    from prefect.states import Completed
    from prefect_htcdask.runner import flow_run as sessions
    from prefect_htcdask.utils import aio as threads
    from prefect_htcdask.runner.ui.events import FlowEvents
    from prefect_htcdask.runner.states.reporter import Ended, StateReporter

    @task
    def nothing(): pass

    def late():
        threading.main_thread().join()
        assert threads.interpreter_ends()
        events.created("http://dashboard", ["default"])
        sessions.FlowRunSession.log(run, "warning", "a line after the end")
        try:
            reporter._emit_end(Ended(uuid.uuid4(), "nothing", nothing, Completed()), None)
        except RuntimeError as exc:
            print(exc)
        print("all was tried")

    events = FlowEvents("cluster", contextvars.copy_context())
    reporter = StateReporter(uuid.uuid4())
    run = SimpleNamespace(_context=contextvars.copy_context(), logger=logging.getLogger("prefect.flow_runs"))
    assert not threads.interpreter_ends()
    threading.Thread(target=late).start()
"""


def test_nothing_that_a_late_thread_tells_prints_a_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LATE)], capture_output=True, text=True, timeout=300, check=False
    )
    assert "all was tried" in done.stdout and done.returncode == 0, done.stderr
    assert "sends no more events" in done.stdout
    assert "a line after the end" in done.stderr
    assert "Traceback" not in done.stderr and "shutdown" not in done.stderr, done.stderr


def test_the_interpreter_goes_on() -> None:
    assert not interpreter_ends()
    assert not asyncio.run(asyncio.to_thread(interpreter_ends))
