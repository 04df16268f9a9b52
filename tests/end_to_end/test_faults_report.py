"""The table of the fault matrix: which rows make its exit status, and what it says of those that were not run."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.faults.row import Row

MET = Row("met", flow="Completed", not_terminal=0, met=True)
FAILED = Row("failed", flow="Running", not_terminal=1, complaints=["task runs that did not end: 1"])
NOT_RUN = Row("cut", not_run="a network interface between namespaces needs root")


def report(tmp_path: Path, rows: list[Row], *arguments: str) -> tuple[int, str]:
    """Exit status and output of the report on what rows measured."""
    results = tmp_path / "faults.jsonl"
    results.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    command = [sys.executable, "-m", "tools.faults_report", "--from", str(results), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize(
    ("rows", "arguments", "status"),
    [
        ([MET], [], 0),
        ([MET, FAILED], [], 1),
        ([MET, NOT_RUN], [], 0),
        ([MET, NOT_RUN], ["--complete"], 1),
        ([MET], ["--complete"], 0),
        ([MET, FAILED, NOT_RUN], [], 1),
        ([NOT_RUN], [], 1),
        ([], [], 1),
    ],
)
def test_its_exit_status(rows: list[Row], arguments: list[str], status: int, tmp_path: Path) -> None:
    assert report(tmp_path, rows, *arguments)[0] == status


def test_it_says_what_was_not_run(tmp_path: Path) -> None:
    said = report(tmp_path, [MET, NOT_RUN])[1]
    assert "cut: not run: a network interface between namespaces needs root" in said
    assert "1 of 1 rows met" in said and "1 rows were not run here" in said and "leave the exit status" in said
    assert "count as not met" in report(tmp_path, [MET, NOT_RUN], "--complete")[1]
