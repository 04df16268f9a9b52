"""A flow of the matrix in a process of its own, and what it tells of itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.faults import analysis_path
from tests.faults.arena import kill
from tests.support.waiting import PATIENCE, wait_until

START_TIMEOUT = 120.0


class FlowProcess:
    """`analysis.py` with an order.

    Args:
        directory: for its files; made here.
        environment: of its process.
        order: what differs from `ORDER`.
    """

    ORDER: dict[str, Any] = {
        "flow": "analysis",
        "flow_run": None,
        "quick": ["q0", "q1", "q2"],
        "late": [["g0", "gated"], ["g1", "gated"]],
        "pause": False,
        "once": True,
        "fill_mib": 64,
        "minimum": 0,
        "maximum": 2,
        "retries": 0,
        "task_retries": 0,
        "hooks": False,
    }

    def __init__(self, directory: Path, environment: Mapping[str, str], **order: Any) -> None:
        assert not set(order) - set(self.ORDER), order
        self.directory = directory
        self.marks = directory / "marks"
        self.source = directory / "source"
        self.log = directory / "flow.log"
        self.marks.mkdir(parents=True)
        self.source.mkdir()
        self.order = {**self.ORDER, **order, "marks": str(self.marks)}
        shutil.copy(analysis_path(), self.source)
        (self.source / "order.json").write_text(json.dumps(self.order))
        self.environment = dict(environment)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> FlowProcess:
        """Start it by plain ``python analysis.py``."""
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(self.source / "analysis.py")],
                cwd=self.source,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def end(self) -> None:
        """End what a row that failed left of it."""
        if self.process is not None and self.process.poll() is None:
            kill(self.process.pid)
            self.process.wait(10)

    # What it tells

    def told(self, word: str, timeout: float = START_TIMEOUT) -> dict[str, Any]:
        """Wait for a word of the flow."""
        path = self.marks / f"{word}.json"

        def look() -> bool:
            if path.exists():
                return True
            if self.process is not None and self.process.poll() is not None and not path.exists():
                raise AssertionError(f"the flow ended before it said {word!r}: {self.tail()}")
            return False

        wait_until(look, timeout, f"the flow says {word!r}: {self.tail()}")
        return self.said(word)

    def said(self, word: str) -> dict[str, Any]:
        """A word of the flow, empty where it did not say it."""
        path = self.marks / f"{word}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def runs_of(self, task: str) -> list[list[str]]:
        """For each execution of a task its process id, scratch directory and time."""
        path = self.marks / task
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def runs(self, task: str, times: int = 1, timeout: float = START_TIMEOUT) -> int:
        """Wait until a task has begun so many times; returns the process id of the worker of that execution."""

        def look() -> list[list[str]]:
            if self.process is not None and self.process.poll() is not None:
                raise AssertionError(f"the flow ended before {task} ran {times} times: {self.tail()}")
            return self.runs_of(task)[times - 1 :]

        return int(wait_until(look, timeout, f"{task} runs for the {times}. time")[0][0])

    def compute(self) -> FlowProcess:
        """Wait until all of its late tasks run."""
        for name, _kind in self.order["late"]:
            self.runs(name)
        return self

    def let_go(self) -> None:
        (self.marks / "go").touch()

    def say(self, word: str) -> None:
        (self.marks / word).touch()

    @property
    def flow_run_id(self) -> str:
        return str(self.told("began")["flow_run_id"])

    @property
    def pid(self) -> int:
        """Process id of the flow, whoever started it."""
        return int(self.told("began")["pid"])

    @property
    def supervisor(self) -> psutil.Process:
        """The supervisor process that lives now."""

        def look() -> list[psutil.Process]:
            children = psutil.Process(self.pid).children()
            living = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
            return [child for child in living if "prefect_htcdask.supervisor" in child.cmdline()]

        return wait_until(look, 30, "there is a supervisor")[0]

    def wait(self, timeout: float = 120) -> int:
        """Wait for its end, for so many seconds of an idle machine; returns its exit status."""
        assert self.process is not None
        timeout *= PATIENCE
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the flow did not end within {timeout:.0f} s: {self.tail()}") from None

    def job_of(self, task: str, times: int = 1) -> str:
        """The HTCondor job on which an execution of a task runs."""
        pid = self.runs(task, times)
        ad = Path(psutil.Process(pid).environ()["_CONDOR_JOB_AD"]).read_text()
        pairs = dict(line.split(" = ", 1) for line in ad.splitlines() if " = " in line)
        return f"{pairs['ClusterId']}.{pairs['ProcId']}"

    def tail(self, lines: int = 40) -> str:
        """The last lines that it said."""
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
