"""The option --watch of the commands jobs and status, in a terminal and elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from prefect_htcdask.cli.watch import INTERRUPTED, LEAST_INTERVAL
from prefect_htcdask.embedded import EmbeddedEndpoint, status
from prefect_htcdask.gateway import HTCGatewayCluster
from prefect_htcdask.settings import EmbeddedSettings
from tests.support.command_line import run
from tests.support.terminal import SHOW_CURSOR, UP_A_LINE, in_terminal

pytestmark = pytest.mark.daemons

NewCluster = Callable[..., HTCGatewayCluster]
OFTEN = ("--watch", "--interval", str(LEAST_INTERVAL))
FOOTER = "Ctrl-C ends it"


def test_what_is_watched_ends_with_ctrl_c_and_with_the_status_as_without_watching(tmp_path: Path) -> None:
    with in_terminal("status", "--directory", str(tmp_path), *OFTEN) as terminal:
        terminal.shows("stopped")
        terminal.shows(FOOTER)
        terminal.shows(FOOTER)
        assert UP_A_LINE in terminal.written, "the second table takes the first one's place"
        assert terminal.press_ctrl_c() == 1 == run("status", "--directory", str(tmp_path)).returncode
        assert "Traceback" not in terminal.text
        assert terminal.written.rindex(SHOW_CURSOR) > terminal.written.rindex("stopped"), "the cursor is back"
        after_the_last_look = terminal.text[terminal.text.rindex("stopped") :]
        assert "Ctrl-C ends it" not in after_the_last_look, "what stays on the screen says nothing of watching"


def test_where_there_is_no_terminal_watching_is_one_look(tmp_path: Path) -> None:
    once, watched = (run("status", "--directory", str(tmp_path), *options) for options in ([], OFTEN))
    assert (watched.returncode, watched.stdout) == (once.returncode, once.stdout)
    assert watched.stderr == "--watch: standard output is no terminal, so this is one look\n"
    # What colours a pipe makes no terminal of it.
    assert run("status", "--directory", str(tmp_path), *OFTEN, FORCE_COLOR="1").returncode == once.returncode


@pytest.mark.parametrize("command", ["jobs", "status"])
def test_options_that_make_no_sense(command: str) -> None:
    both = run(command, "--json", "--watch")
    assert both.returncode == 2 and both.stdout == ""
    assert "--json and --watch exclude each other" in both.stderr and len(both.stderr.splitlines()) == 1
    often = run(command, "--watch", "--interval", "1")
    assert often.returncode == 2 and "greater than or equal to 5" in often.stderr


def test_jobs_come_and_go_before_ones_eyes(new_cluster: NewCluster, condor_environment: EmbeddedEndpoint) -> None:
    with in_terminal("jobs", *OFTEN) as terminal:
        terminal.shows("no worker jobs in the queue")
        cluster = new_cluster(n_workers=1)
        terminal.shows(cluster.run_directory.name)
        terminal.shows("running")
        cluster.close()
        terminal.shows("no worker jobs in the queue")
        assert terminal.press_ctrl_c() == 0
        assert "Traceback" not in terminal.text


def test_a_schedd_that_is_away_for_a_while_is_no_end_of_watching(
    condor_environment: EmbeddedEndpoint, tmp_path: Path
) -> None:
    """The schedd is lost and found by way of the file that says where it is."""
    assert condor_environment.condor_config is not None
    config, aside = tmp_path / "condor_config", tmp_path / "aside"
    shutil.copy(condor_environment.condor_config, config)
    named = {"PREFECT_INTEGRATIONS_HTCDASK_CONDOR_CONFIG_FILE": str(config)}
    with in_terminal("jobs", *OFTEN, **named) as terminal:
        terminal.shows(FOOTER)
        config.rename(aside)
        terminal.shows("condor.config_file = ")
        terminal.shows(FOOTER)
        aside.rename(config)
        terminal.expect(r"no worker jobs in the queue\s+(\x1b\[[0-9;]*m)*as of")
        config.rename(aside)
        terminal.shows("condor.config_file = ")
        assert terminal.press_ctrl_c() == 1
    with in_terminal("jobs", *OFTEN, **named) as terminal:
        assert terminal.end() == 1, "the first look is as without watching"
        assert "error: condor.config_file" in terminal.text and "Traceback" not in terminal.text


def test_ctrl_c_before_the_first_answer(condor_environment: EmbeddedEndpoint) -> None:
    with stopped_schedd(condor_environment), in_terminal("jobs", *OFTEN) as terminal:
        terminal.shows("asking HTCondor")
        assert terminal.press_ctrl_c() == INTERRUPTED
        assert "Traceback" not in terminal.text


@contextmanager
def stopped_schedd(endpoint: EmbeddedEndpoint) -> Iterator[None]:
    """A schedd that takes connections and answers none while the block lasts."""
    keeper = psutil.Process(status(EmbeddedSettings(directory=str(endpoint.directory)))["keeper"])
    (schedd,) = (process for process in keeper.children(recursive=True) if process.name() == "condor_schedd")
    schedd.suspend()
    try:
        yield
    finally:
        schedd.resume()
