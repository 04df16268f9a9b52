"""What a flow's process says of logging holds for its task runs on workers."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import distributed
import pytest

from prefect_htcdask.worker import flow_logging
from prefect_htcdask.worker.flow_logging import FlowLogging

SPEAKING = """
import json, logging, sys, time
from prefect import flow, get_client, get_run_logger, task
from prefect.client.schemas.filters import LogFilter
from prefect.context import FlowRunContext
from prefect_htcdask import HTCDaskTaskRunner

@task
def speak():
    get_run_logger().debug("task-debug")
    get_run_logger().warning("task-warning")
    logging.getLogger("minelib").warning("extra-warning")
    logging.getLogger("minelib.sub").info("extra-info")
    logging.getLogger("otherlib").warning("other-warning")
    get_run_logger().error("task-error")

@flow(task_runner=HTCDaskTaskRunner(address=sys.argv[1]))
def speaking():
    speak.submit().result()
    return FlowRunContext.get().flow_run.id

flow_run_id = speaking()
messages, deadline = [], time.monotonic() + 90
with get_client(sync_client=True) as client:
    while "task-error" not in messages and time.monotonic() < deadline:
        time.sleep(0.3)
        logs = client.read_logs(LogFilter(flow_run_id={"any_": [flow_run_id]}), limit=200)
        messages = [log.message for log in logs if log.task_run_id is not None]
print("RESULT", json.dumps(messages))
"""


def said(address: str, api: Any, **environment: str) -> set[str]:
    """Runs a flow in a process with these variables; what the Prefect API has of its task run's words."""
    done = subprocess.run(
        [sys.executable, "-c", SPEAKING, address],
        env={**os.environ, **api.environment, **environment},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    words = {"task-debug", "task-warning", "task-error", "extra-warning", "extra-info", "other-warning"}
    return words & set(json.loads(done.stdout.partition("RESULT ")[2]))


def test_loggers_and_levels_of_the_flow_hold_on_workers(prefect_api: Any, tmp_path: Path) -> None:
    """Of flow runs that come one after the other to the same worker, too."""
    usual = {"task-warning", "task-error"}
    own_file = tmp_path / "logging.yml"
    own_file.write_text(
        textwrap.dedent("""
            version: 1
            formatters:
              plain:
                format: "OWN %(message)s"
            handlers:
              api:
                class: prefect.logging.handlers.APILogHandler
              mine:
                class: logging.StreamHandler
                formatter: plain
            loggers:
              prefect: {level: "${PREFECT_LOGGING_LEVEL}"}
              prefect.task_runs: {level: ERROR, handlers: [api, mine]}
              otherlib: {level: WARNING, handlers: [api]}
        """)
    )
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None
    ) as cluster:
        address = cluster.scheduler_address
        assert said(address, prefect_api) == usual
        assert said(address, prefect_api, PREFECT_LOGGING_LEVEL="DEBUG") == {*usual, "task-debug"}
        assert said(address, prefect_api, PREFECT_LOGGING_EXTRA_LOGGERS="minelib") == {*usual, "extra-warning"}
        with_info = {"PREFECT_LOGGING_EXTRA_LOGGERS": "minelib", "PREFECT_LOGGING_ROOT_LEVEL": "INFO"}
        assert said(address, prefect_api, **with_info) == {*usual, "extra-warning", "extra-info"}
        overridden = {"PREFECT_LOGGING_LOGGERS_PREFECT_TASK_RUNS_LEVEL": "ERROR"}
        assert said(address, prefect_api, **overridden) == {"task-error"}
        # Its contents travel, not its path.
        by_file = said(address, prefect_api, PREFECT_LOGGING_SETTINGS_PATH=str(own_file))
        assert by_file == {"task-error", "other-warning"}
        assert said(address, prefect_api) == usual


TWO_AT_A_TIME = """
import logging
from prefect_htcdask.worker.flow_logging import FlowLogging, describe, logging_as, take_on

config = describe().config

class Kept(logging.Handler):
    def emit(self, record):
        print(record.getMessage(), flush=True)

def at(level, extra=()):
    loggers = {**config["loggers"], "prefect": {"level": level}}
    return FlowLogging({**config, "loggers": loggers}, tuple(extra))

for name in ("prefect", "prefect.extra"):
    logging.getLogger(name).addHandler(Kept())
loud, quiet = at("DEBUG", ["minelib"]), at("ERROR")
for one in (loud, quiet):
    take_on(one)
for name, one in (("loud", loud), ("quiet", quiet), ("loud", loud)):
    with logging_as(one):
        logging.getLogger("prefect.task_runs").debug("%s debug", name)
        logging.getLogger("prefect.task_runs").error("%s error", name)
        logging.getLogger("minelib").warning("%s extra", name)
take_on(loud)
with logging_as(quiet):
    logging.getLogger("prefect.task_runs").warning("quiet warning")
"""


def test_flow_runs_on_one_worker_at_a_time_have_levels_of_their_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TWO_AT_A_TIME], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    loud = ["loud debug", "loud error", "loud extra"]
    assert done.stdout.splitlines() == [*loud, "quiet error", *loud]


def test_handlers_that_cannot_be_made_on_a_worker_are_told_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_logging, "_known", [])
    monkeypatch.setattr(flow_logging, "_applied", None)
    before = flow_logging.describe()
    handlers = {"file": {"class": "logging.FileHandler", "filename": "/nonexistent/flow.log"}}
    try:
        with caplog.at_level(logging.WARNING, "htcdask"):
            flow_logging.take_on(FlowLogging({**before.config, "handlers": handlers}))
        assert "cannot be made" in caplog.text and "/nonexistent/flow.log" in caplog.text
        assert flow_logging.describe() == before
    finally:
        flow_logging.take_on(before)


@pytest.mark.parametrize("level, number", [("DEBUG", 10), ("30", 30), (40, 40), (None, 0), ("nonsense", 0)])
def test_levels_are_read_as_logging_does(level: Any, number: int) -> None:
    assert FlowLogging({"loggers": {"one": {"level": level}}}).levels == {"one": number}
