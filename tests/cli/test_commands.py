"""The command line: what it prints, and that its exit status is 0 only where all is well."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefect_htcdask.embedded import EmbeddedEndpoint, status
from prefect_htcdask.settings import EmbeddedSettings
from tests.support.command_line import run

PREFIX = "PREFECT_INTEGRATIONS_HTCDASK_EMBEDDED"


COMMANDS = ("up", "down", "status", "jobs", "sweep", "doctor")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_every_command_has_help(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.returncode == 0
    assert "Usage:" in result.stdout
    assert all(word in result.stdout for word in COMMANDS if not command)


@pytest.mark.daemons
def test_up_status_down(tmp_path: Path) -> None:
    fields = {"DIRECTORY": str(tmp_path), "USE_CONFIGURED_POOL": "false", "IDLE_TIMEOUT": "2m"}
    own = {f"{PREFIX}_{field}": value for field, value in fields.items()}
    settings = EmbeddedSettings(directory=str(tmp_path))
    before = run("status", "--json", **own)
    assert before.returncode == 1
    assert json.loads(before.stdout)["running"] is False
    try:
        started = run("up", **own)
        assert started.returncode == 0, started.stderr
        assert "starting the embedded HTCondor pool and Dask Gateway\n" in started.stderr
        report = status(settings)
        assert report["gateway"]["address"] in started.stdout
        assert f"CONDOR_CONFIG={tmp_path}/condor/condor_config" in started.stdout
        assert (tmp_path / "gateway-password").read_text() not in started.stdout + started.stderr
        again = run("up", **own)
        assert (again.stdout, again.stderr) == (started.stdout, ""), "nothing had to be waited for"

        shown = run("status", "--json", **own)
        assert shown.returncode == 0
        answer = json.loads(shown.stdout)
        assert answer["running"] is True
        assert answer["keeper"] == report["keeper"]
        assert answer["pool"]["schedd_address"] and answer["gateway"]["proxy_address"]
        assert answer["idle"]["timeout"] == 120
        table = run("status", **own)
        assert table.returncode == 0
        assert report["gateway"]["address"] in table.stdout and "0 running" in table.stdout
    finally:
        stopped = run("down", **own)
    assert (stopped.returncode, stopped.stdout) == (0, "stopped\n")
    assert run("down", **own).stdout == "nothing was running\n"
    assert run("status", **own).returncode == 1


@pytest.mark.daemons
def test_status_fails_where_a_part_does_not_answer(
    embedded: EmbeddedEndpoint, embedded_settings: EmbeddedSettings
) -> None:
    """The pool's configuration is asked of the state file; the pool that it names is not there."""
    state = (embedded.directory / "state.json").read_text()
    elsewhere = embedded.directory.parent / f"{embedded.directory.name}-elsewhere"
    elsewhere.mkdir()
    raw = json.loads(state)
    raw["gateway_address"] = "http://127.0.0.1:9"
    (elsewhere / "state.json").write_text(json.dumps(raw))
    result = run("status", "--json", "--directory", str(elsewhere))
    answer = json.loads(result.stdout)
    assert result.returncode == 1
    assert answer["running"] is False and answer["gateway"] is None and answer["pool"]["cpus"] >= 4


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("MEMORY", "lots", "setting embedded.memory (PREFECT_INTEGRATIONS_HTCDASK_EMBEDDED_MEMORY) = 'lots'"),
        ("SLOTS", "0", "setting embedded.slots (PREFECT_INTEGRATIONS_HTCDASK_EMBEDDED_SLOTS) = '0'"),
        ("ENABLED", "false", "embedded.enabled is False; set gateway.address"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(field: str, value: str, message: str, tmp_path: Path) -> None:
    result = run("up", "--directory", str(tmp_path), **{f"{PREFIX}_{field}": value})
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
