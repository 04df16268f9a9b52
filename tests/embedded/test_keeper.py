"""The keeper: it restarts what died, leaves nothing behind when killed, and stops when nobody uses the pool."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from prefect_htcdask.embedded import EmbeddedError, ensure_running, status, stop
from prefect_htcdask.embedded.gateway_server import list_clusters
from prefect_htcdask.embedded.state import Process, State, StateDirectory
from prefect_htcdask.gateway import GatewayClusterError, HTCGatewayCluster
from prefect_htcdask.settings import EmbeddedSettings, load_settings
from tests.support.own_pool import (
    COUNT_JOBS,
    SUBMIT,
    in_pool,
    keeper_tree,
    keeper_with,
    start_cluster,
    until,
)
from tests.support.pool_fixtures import living

pytestmark = pytest.mark.daemons


@pytest.mark.parametrize("name", ["condor", "gateway", "proxy"])
def test_what_dies_is_restarted(own: EmbeddedSettings, name: str) -> None:
    endpoint = ensure_running(own)
    before = status(own)
    family = [psutil.Process(before["processes"][name])]
    family += family[0].children(recursive=True)
    os.kill(before["processes"][name], signal.SIGKILL)
    until(lambda: status(own)["processes"].get(name) not in (None, before["processes"][name]))
    until(lambda: status(own)["running"])
    assert living(family) == []
    assert ensure_running(own) == endpoint  # at the same address
    others = {other: pid for other, pid in before["processes"].items() if other != name}
    assert others.items() <= status(own)["processes"].items()


def test_clusters_outlive_the_gateway_server(own: EmbeddedSettings) -> None:
    endpoint = ensure_running(own)
    cluster = start_cluster(endpoint)
    server = status(own)["processes"]["gateway"]
    os.kill(server, signal.SIGKILL)
    until(lambda: status(own)["processes"].get("gateway") not in (None, server))
    until(lambda: status(own)["running"])
    clusters = list_clusters(endpoint.gateway_address, endpoint.username, endpoint.password)
    assert list(clusters) == [cluster]
    assert clusters[cluster]["status"] == "RUNNING"


def test_nothing_outlives_a_killed_keeper(own: EmbeddedSettings, tmp_path: Path) -> None:
    endpoint = ensure_running(own)
    start_cluster(endpoint)
    job = {"executable": "/bin/sleep", "transfer_executable": "false", "arguments": "600", "log": str(tmp_path / "log"),
           "request_memory": "10", "request_disk": "1MB"}  # fmt: skip
    assert in_pool(endpoint, SUBMIT, json.dumps(job), "1").returncode == 0
    until(lambda: "Job executing" in (tmp_path / "log").read_text())
    processes = keeper_tree(own)
    assert any("dask_scheduler" in " ".join(process.cmdline()) for process in processes)
    processes[0].kill()
    with suppress(AssertionError):
        until(lambda: not living(processes), timeout=20)
    assert living(processes) == []
    assert status(own)["running"] is False
    again = ensure_running(own)
    assert status(own)["gateway"]["clusters"] == []
    # HTCondor's queue survives a crash, as always; only `stop` forgets it.
    assert in_pool(again, COUNT_JOBS).stdout.strip() == "1"


def test_starts_on_the_leftovers_of_a_dead_keeper_and_guard(own: EmbeddedSettings) -> None:
    endpoint = ensure_running(own)
    start_cluster(endpoint)
    processes = keeper_tree(own)
    guard = next(process for process in processes if "prefect_htcdask.embedded.guard" in process.cmdline())
    guard.kill()
    processes[0].kill()
    until(lambda: not living(processes[:1]))
    again = ensure_running(own)
    assert living(processes) == []
    assert status(own)["running"] and again.directory == endpoint.directory


def test_never_ends_a_users_own_program_that_uses_the_pool(own: EmbeddedSettings) -> None:
    endpoint = ensure_running(own)
    code = "import sys, htcondor2; print(len(htcondor2.Schedd().query()), flush=True); sys.stdin.read()"
    environment = {**os.environ, "CONDOR_CONFIG": str(endpoint.condor_config)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None and program.stdout.readline() == "0\n"
        processes = keeper_tree(own)
        processes[0].kill()
        until(lambda: not living(processes), timeout=20)
        assert program.poll() is None


@pytest.mark.parametrize("boot", ["of this boot", "before a reboot"])
def test_never_ends_a_process_that_only_has_the_id_of_one_of_ours(own: EmbeddedSettings, boot: str) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    try:
        real = Process.of(stranger.pid)
        assert real is not None
        past = Process(real.pid, real.started, "0") if boot == "before a reboot" else Process(real.pid, 1, real.boot)
        directory = StateDirectory(own.directory)
        directory.create()
        directory.write(State(phase="running", keeper=past, processes={"condor": past}))
        assert status(own)["running"] is False
        ensure_running(own)
        assert status(own)["running"] is True
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_starts_where_a_power_loss_tore_its_files(own: EmbeddedSettings) -> None:
    directory = StateDirectory(own.directory)
    directory.create()
    directory.state_file.write_text('{"phase": "runn')
    directory.pool.mkdir()
    (directory.pool / "log").mkdir()
    (directory.pool / "log" / ".schedd_address").write_text("<127.0.0.1:1>\n")
    ensure_running(own)
    assert status(own)["running"] is True


def test_stops_when_nobody_uses_it(tmp_path: Path) -> None:
    settings = EmbeddedSettings(directory=str(tmp_path / "own"), idle_timeout=3, use_configured_pool=False)
    try:
        ensure_running(settings)
        processes = keeper_tree(settings)
        until(lambda: not living(processes), timeout=30)
        assert status(settings)["phase"] == "stopped"
        assert ensure_running(settings) and status(settings)["running"] is True
    finally:
        stop(settings)


@pytest.mark.parametrize("use", ["cluster", "job"])
def test_stays_while_it_is_used(tmp_path: Path, use: str) -> None:
    # Longer than the process takes that is about to use it.
    settings = EmbeddedSettings(directory=str(tmp_path / "own"), idle_timeout=15, use_configured_pool=False)
    try:
        endpoint = ensure_running(settings)
        keeper = status(settings)["keeper"]
        if use == "cluster":
            start_cluster(endpoint)
        else:
            job = {"executable": "/bin/true", "transfer_executable": "false", "hold": "true"}
            assert in_pool(endpoint, SUBMIT, json.dumps(job), "1").returncode == 0
        # It notes the use whenever it looks; without one it would be gone by then.
        over = time.time() + settings.idle_timeout
        until(lambda: _idle_since(endpoint.directory) > over, timeout=45)
        assert status(settings)["keeper"] == keeper
    finally:
        stop(settings)


def _idle_since(directory: Path) -> float:
    return float(json.loads((directory / "state.json").read_text())["idle_since"])


NO_SCHEDULER = """
from prefect_htcdask.embedded import gateway_server
real = "c.ClusterConfig.scheduler_cmd = {scheduler!r}"
assert real in gateway_server._CONFIG
gateway_server._CONFIG = gateway_server._CONFIG.replace(
    real, "c.ClusterConfig.scheduler_cmd = ['/bin/sh', '-c', 'echo there is no such library >&2; exit 3']"
)
"""


def test_a_scheduler_that_does_not_start_says_why(own: EmbeddedSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper_with(NO_SCHEDULER, monkeypatch)
    ensure_running(own)
    settings = load_settings(embedded=own.model_dump())
    with pytest.raises(GatewayClusterError, match=r"failed to start.*\n?.*there is no such library"):
        HTCGatewayCluster(settings=settings)
    config = (Path(str(own.directory)) / "gateway" / "gateway_config.py").read_text()
    assert "cluster_start_timeout = 300" in config


def test_a_start_that_fails_says_why_and_leaves_nothing(
    own: EmbeddedSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installed HTCondor whose master dies at once."""
    for name, text in (
        ("bin/condor_version", "#!/bin/sh\necho '$CondorVersion: 99.0.0 broken $'\n"),
        ("sbin/condor_master", "#!/bin/sh\necho 'no such thing as a free pool' >&2; exit 44\n"),
    ):
        program = tmp_path / "broken" / name
        program.parent.mkdir(parents=True)
        program.write_text(text)
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/broken/sbin:{os.environ['PATH']}")
    with pytest.raises(EmbeddedError, match=r"condor ended 3 times at start: .*no such thing as a free pool"):
        ensure_running(own)
    assert status(own)["phase"] == "failed"
    assert "free pool" in status(own)["message"]
    monkeypatch.undo()
    ensure_running(own)
    assert status(own)["running"] is True
