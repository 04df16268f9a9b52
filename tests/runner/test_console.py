"""What a flow run waits for, under its log in a terminal."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import htcondor2
import pytest
from rich.console import Console
from rich.theme import Theme

from prefect_htcdask.embedded import EmbeddedEndpoint
from prefect_htcdask.embedded.progress import Fetched
from prefect_htcdask.runner.ui.console import StartConsole, log_console
from prefect_htcdask.runner.ui.progress_bar import ProgressBar
from tests.support.prefect_fixtures import PrefectServer
from tests.support.terminal import SHOW_CURSOR, python_in_terminal
from tests.support.waiting import wait_until

FLOW = """
from prefect import flow, task
from prefect_htcdask import HTCDaskTaskRunner

@task
def work(number):
    return number + 1

@flow(task_runner=HTCDaskTaskRunner(cluster_kwargs={"memory": "300 MiB", "disk": "100 MiB"}))
def analysis():
    future = work.submit(1)
    print("said while it waits")
    print("the result is", future.result())

analysis()
"""


def terminal() -> Console:
    # As Prefect makes that of its log: without rich's own styles.
    return Console(file=io.StringIO(), force_terminal=True, width=160, theme=Theme(inherit=False))


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def job(job_id: str, what: str, state: str) -> dict[str, Any]:
    return {"kind": "job", "what": what, "job_id": job_id, "state": state}


def test_the_words_follow_the_jobs_until_the_first_worker_joins() -> None:
    console = terminal()
    waiting = StartConsole(console)
    assert waiting.words() == "waiting for the first worker's job"
    for number in range(3):
        waiting.take(job(f"1.{number}", "submitted", "idle"))
    waiting.take({"kind": "waiting", "summary": "0 of 214 slots have 64 GiB"})
    idle = "3 idle in HTCondor's queue (0 of 214 slots have 64 GiB)"
    assert waiting.words() == f"waiting for the first worker: {idle}"
    waiting.take(job("1.0", "started", "running"))
    waiting.take(job("1.1", "held", "held"))
    waiting.take(job("1.2", "removed", "removed"))
    assert waiting.words() == "waiting for the first worker: 1 started, the worker connects, 1 held"
    waiting.take(job("1.0", "joined", "running"))
    assert shown(console).endswith(f"{SHOW_CURSOR}\r\x1b[1A\x1b[2K"), "the line is gone and the cursor back"
    waiting.take(job("1.3", "submitted", "idle"))
    waiting.close()
    assert shown(console).count(SHOW_CURSOR) == 1


@pytest.mark.parametrize("kind", ["failed", "flow_run_ended"])
def test_nothing_is_waited_for_where_no_worker_will_come(kind: str) -> None:
    console = terminal()
    waiting = StartConsole(console)
    waiting.take({"kind": kind})
    assert SHOW_CURSOR in shown(console)


def test_one_line_in_a_terminal_is_enough() -> None:
    console = terminal()
    first, second = StartConsole(console), StartConsole(console)
    second.take(job("2.0", "submitted", "idle"))
    second.close()
    first.take(job("1.0", "submitted", "idle"))
    first.close()
    assert shown(console).count(SHOW_CURSOR) == 1


def test_a_download_has_a_bar_for_as_long_as_it_lasts() -> None:
    console = terminal()
    with ProgressBar(console, "looking") as bar:
        bar.take(Fetched("fetching HTCondor", 5_000_000, 20_000_000))
        wait_until(lambda: "5.0/20.0 MB" in shown(console), 10, "the download's bar")
        bar.take("starting the pool")
        wait_until(lambda: "starting the pool" in shown(console), 10, "what is next")
    assert "MB" not in shown(console).rpartition("starting the pool")[2]


def test_where_the_log_goes_to_no_terminal_nothing_is_shown() -> None:
    assert not sys.stderr.isatty()
    assert log_console() is None, logging.getLogger().handlers
    StartConsole(None).take(job("1.0", "submitted", "idle"))


@pytest.mark.pool
@pytest.mark.timeout(180)
def test_a_flow_in_a_terminal_shows_what_it_waits_for(
    prefect_api: PrefectServer, condor_environment: EmbeddedEndpoint, tmp_path: Path
) -> None:
    script = tmp_path / "waits.py"
    script.write_text(FLOW)
    # The job is idle until it is let go: a machine that is busy draws the line less often than the pool matches jobs.
    with python_in_terminal(str(script), PREFECT_INTEGRATIONS_HTCDASK_WORKER_REQUIREMENTS="MY.LetGo =?= true") as there:
        there.shows("the gateway starts a Dask scheduler")
        there.shows("waiting for the first worker: 1 idle in HTCondor's queue")
        htcondor2.Schedd().edit("LetGo isnt true && JobStatus == 1", "LetGo", "true")
        there.shows("waiting for the first worker: 1 started, the worker connects")
        there.shows("the result is 2")
        assert there.end() == 0, there.text
    before, _, after = there.written.partition("the result is 2")
    assert before.rindex(SHOW_CURSOR) > before.rindex("the worker connects"), "the line is gone"
    assert "waiting for" not in after
    lines = [line for line in there.text.splitlines() if " | " in line]
    assert lines and not [line for line in lines if "waiting for the first worker" in line], "no log line is torn"

    piped = subprocess.run([sys.executable, script], env=os.environ, capture_output=True, text=True, timeout=120)
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout == "said while it waits\nthe result is 2\n"
    assert "waiting for the first worker" not in piped.stderr
