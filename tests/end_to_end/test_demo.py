"""`make demo` itself, on a state directory of its own: what it says, and that nothing outlives it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from tools import demo as demo_module

pytestmark = pytest.mark.daemons

CHECKOUT = Path(__file__).resolve().parents[2]


def start(state: Path, picture: Path) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "COLUMNS": "200",
        # What a user may have set for work of their own; the demo is not to use it.
        "PREFECT_API_URL": "http://127.0.0.1:9/api",
        "PREFECT_INTEGRATIONS_HTCDASK_GATEWAY_ADDRESS": "http://127.0.0.1:9",
        "DASK_GATEWAY__ADDRESS": "http://127.0.0.1:9",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tools.demo", "--state", str(state), "--picture", str(picture)],
        cwd=CHECKOUT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def left_behind(state: Path) -> list[str]:
    """Living processes that know of the demo's state directory."""
    found = []
    for process in psutil.process_iter():
        try:
            told = [*process.cmdline(), *process.environ().values()]
            zombie = process.status() == psutil.STATUS_ZOMBIE
            if process.pid != os.getpid() and not zombie and any(str(state) in text for text in told):
                found.append(f"{process.pid} {told[:4]}")
        except psutil.Error:
            continue
    return found


def test_what_is_just_ending_is_waited_for_and_what_stays_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", "import sys; sys.stdin.read()", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        monkeypatch.setattr(demo_module, "FLOW_END", 0.5)
        (named,) = demo_module._await_end(tmp_path)
        assert named.startswith(f"{process.pid} (") and "sys.stdin.read()" in named
        assert demo_module._await_end(tmp_path, ["-m", "prefect_htcdask.supervisor"]) == []
        monkeypatch.setattr(demo_module, "FLOW_END", 120.0)
        threading.Timer(0.3, process.stdin.close).start()
        assert demo_module._await_end(tmp_path) == []


@pytest.mark.timeout(1500)
def test_demo_says_what_it_found_and_leaves_nothing(tmp_path: Path) -> None:
    state, picture = tmp_path / "state", tmp_path / "spectrum.png"
    demo = start(state, picture)
    said, _ = demo.communicate(timeout=1400)
    assert demo.returncode == 0, said
    for pattern in (
        r"Prefect UI +http://127\.0\.0\.1:\d+",
        r"Dask dashboard is available at http://127\.0\.0\.1:\d+/clusters/",
        r"Events +80\n",
        r"Peak +86\.9 to 95\.6 GeV, with 5 pairs: nano_dimuon \(data\)",
        rf"Picture +{picture}",
        r"HTCondor job +\d+\.\d+ on \S+@\S+, \d+ s",
        r"no process is left",
    ):
        assert re.search(pattern, said), f"{pattern}\n{said}"
    # Log lines and results, but nothing that only frightens.
    assert not re.search(r"Traceback|Warning|--- Logging error|Error logging to API", said), said
    assert picture.stat().st_size > 10_000
    assert left_behind(state) == []


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_demo_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    state = tmp_path / "state"
    demo = start(state, tmp_path / "spectrum.png")
    assert demo.stdout is not None
    said = ""
    for line in demo.stdout:
        said += line
        if "events in 2 files" in line:  # its worker jobs are in the queue now
            break
    assert left_behind(state), said
    demo.send_signal(number)
    rest, _ = demo.communicate(timeout=1000)
    assert demo.returncode == 130, said + rest
    assert "no process is left" in rest
    assert left_behind(state) == []
