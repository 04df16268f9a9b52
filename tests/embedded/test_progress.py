"""What is told of work that takes long: to a log, to a pipe, and in a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefect_htcdask.embedded.condor_binaries import installed
from prefect_htcdask.embedded.progress import Fetched, occasionally, telling_of_files
from prefect_htcdask.settings import ENV_PREFIX
from tests.support.command_line import run
from tests.support.terminal import in_terminal
from tests.support.waiting import wait_until


def test_a_log_gets_all_but_the_steps_of_a_download() -> None:
    told: list[str] = []
    tell = occasionally(told.append, pause=3600)
    for message in (
        "before",
        *(Fetched("bringing it", done, 3_000_000) for done in (0, 10, 1_500_000, 3_000_000)),
        "after",
    ):
        tell(message)
    assert told == ["before", "bringing it: 0.0 of 3.0 MB", "bringing it: 3.0 of 3.0 MB", "after"]
    told.clear()
    tell = occasionally(told.append, pause=0)
    tell(Fetched("bringing it", 10, 20))
    tell(Fetched("bringing it", 11, 20))
    assert len(told) == 2


def test_a_download_is_told_of_as_it_comes(tmp_path: Path) -> None:
    told: list[str] = []
    with telling_of_files(told.append, "bringing it", tmp_path, 100):
        wait_until(lambda: told, 5, "the start")
        (tmp_path / "partial").mkdir()
        (tmp_path / "partial" / "a").write_bytes(b"x" * 40)
        wait_until(lambda: len(told) == 2, 5, "the first bytes")
        (tmp_path / "b").write_bytes(b"x" * 70)
    assert [(message.done, message.total) for message in told if isinstance(message, Fetched)] == [
        (0, 100),
        (40, 100),
        (100, 100),
    ]


@pytest.mark.pool
@pytest.mark.skipif(installed() is not None, reason="HTCondor is installed on this machine: nothing is brought")
def test_the_first_start_shows_in_a_terminal_what_it_waits_for(tmp_path: Path) -> None:
    """HTCondor is brought from Debian for real."""
    own = {
        f"{ENV_PREFIX}EMBEDDED_DIRECTORY": str(tmp_path / "state"),
        f"{ENV_PREFIX}EMBEDDED_USE_CONFIGURED_POOL": "false",
        f"{ENV_PREFIX}EMBEDDED_IDLE_TIMEOUT": "2m",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    with in_terminal("up", **own) as terminal:
        terminal.shows("bringing HTCondor from Debian")
        terminal.expect(r"fetching HTCondor.*\d+\.\d/\d+\.\d MB")
        terminal.shows("starting the embedded HTCondor pool and Dask Gateway")
        terminal.shows("State and logs")
        assert terminal.end() == 0
    assert run("down", **own).stdout == "stopped\n"
