"""The embedded pool and gateway as their users see them: one start, one user, jobs that run, nothing left behind."""

from __future__ import annotations

import json
import os
import pwd
import stat
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import psutil
import pytest
from dask_gateway import BasicAuth, Gateway

from prefect_htcdask.embedded import EmbeddedEndpoint, EmbeddedError, ensure_running, status, stop
from prefect_htcdask.embedded import endpoint as module
from prefect_htcdask.embedded.gateway_server import get_json
from prefect_htcdask.settings import EmbeddedSettings
from tests.support.own_pool import COUNT_JOBS, SUBMIT, in_pool, keeper_tree, start_cluster, until
from tests.support.pool_fixtures import living
from tests.support.waiting import slowness

pytestmark = pytest.mark.daemons

START_FROM_ELSEWHERE = """
import sys
from prefect_htcdask.embedded import ensure_running
from prefect_htcdask.settings import EmbeddedSettings
settings = EmbeddedSettings(directory=sys.argv[1], idle_timeout=120, use_configured_pool=False)
print(ensure_running(settings).gateway_address)
"""


COUNT_JOBS_AS = """
import os, sys
import htcondor2
schedd = htcondor2.Collector().locate(htcondor2.DaemonType.Schedd)
if int(sys.argv[1]) != os.geteuid():
    os.setgroups([])
    os.setuid(int(sys.argv[1]))
print(len(htcondor2.Schedd(schedd).query("true", ["ClusterId"])))
"""


def test_starts_once_however_often_and_from_wherever_it_is_asked(
    embedded: EmbeddedEndpoint, embedded_settings: EmbeddedSettings
) -> None:
    keeper = status(embedded_settings)["keeper"]
    assert ensure_running(embedded_settings) == embedded
    command = [sys.executable, "-c", START_FROM_ELSEWHERE, str(embedded.directory)]
    others = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert {other.communicate(timeout=60)[0].strip() for other in others} == {embedded.gateway_address}
    assert status(embedded_settings)["keeper"] == keeper


def test_many_processes_start_one_pool(own: EmbeddedSettings) -> None:
    command = [sys.executable, "-c", START_FROM_ELSEWHERE, str(own.directory)]
    callers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    addresses = {caller.communicate(timeout=120)[0].strip() for caller in callers}
    assert len(addresses) == 1 and addresses.pop().startswith("http://127.0.0.1:")
    log = (Path(str(own.directory)) / "keeper.log").read_text()
    assert log.count("started condor") == 1


def test_a_second_keeper_refuses_the_same_directory(
    embedded: EmbeddedEndpoint, embedded_settings: EmbeddedSettings
) -> None:
    before = status(embedded_settings)
    second = [sys.executable, "-m", "prefect_htcdask.embedded.keeper", str(embedded.directory)]
    pid = int(subprocess.run(second, capture_output=True, text=True, timeout=30, check=True).stdout)
    until(lambda: not living([psutil.Process(pid)]) if psutil.pid_exists(pid) else True)
    assert "not starting twice" in (embedded.directory / "keeper.log").read_text()
    assert status(embedded_settings)["processes"] == before["processes"]


def test_leaves_the_callers_process_alone(embedded: EmbeddedEndpoint) -> None:
    code = (
        START_FROM_ELSEWHERE.replace("print(", "import os\nbefore = dict(os.environ)\nprint(", 1)
        + "assert dict(os.environ) == before\nassert 'htcondor2' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(embedded.directory)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr


def test_status_says_what_runs(embedded: EmbeddedEndpoint, embedded_settings: EmbeddedSettings) -> None:
    report = json.loads(json.dumps(status(embedded_settings)))
    assert report["running"] is True
    assert set(report["processes"]) == {"condor", "gateway", "proxy"}
    assert all(psutil.pid_exists(pid) for pid in report["processes"].values())
    assert report["pool"]["cpus"] >= 4
    assert report["pool"]["collector_address"].startswith("127.0.0.1:")
    assert report["gateway"]["address"] == embedded.gateway_address
    assert {"python", "prefect", "dask", "distributed", "dask-gateway-server", "htcondor", "HTCondor"} <= set(
        report["versions"]
    )
    assert 0 < report["idle"]["left"] <= embedded_settings.idle_timeout


def test_no_one_else_can_read_its_files(embedded: EmbeddedEndpoint) -> None:
    assert stat.S_IMODE(embedded.directory.stat().st_mode) == 0o700
    secrets = ["gateway-password", "state.json", "launch.json", "gateway/gateway_config.py", "gateway/gateway.sqlite"]
    for name in secrets:
        assert stat.S_IMODE((embedded.directory / name).stat().st_mode) == 0o600, name
    assert embedded.password not in repr(embedded)


def test_listens_on_loopback_only(embedded: EmbeddedEndpoint, embedded_settings: EmbeddedSettings) -> None:
    cluster = start_cluster(embedded)
    listening = [
        connection.laddr.ip
        for process in keeper_tree(embedded_settings)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    # The session's gateway goes on to serve tests that want nothing left on it.
    login = BasicAuth(embedded.username, embedded.password)
    with Gateway(embedded.gateway_address, proxy_address=embedded.proxy_address, auth=login) as gateway:
        gateway.stop_cluster(cluster)
    assert len(listening) >= 5
    assert set(listening) == {"127.0.0.1"}


@pytest.mark.parametrize("wrong", ["password", "username"])
def test_the_gateway_accepts_its_user_only(embedded: EmbeddedEndpoint, wrong: str) -> None:
    url = f"{embedded.gateway_address}/api/v1/clusters/"
    login = {"username": embedded.username, "password": embedded.password}
    assert isinstance(get_json(url, **login), dict)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        get_json(url, **{**login, wrong: "mallory"})
    with pytest.raises(urllib.error.HTTPError, match="401"):
        get_json(url)


@pytest.mark.parametrize("method", ["CLAIMTOBE", "ANONYMOUS"])
def test_the_pool_accepts_no_unproven_user(embedded: EmbeddedEndpoint, method: str) -> None:
    assert in_pool(embedded, COUNT_JOBS).returncode == 0
    claim = {f"_CONDOR_SEC_{level}_AUTHENTICATION_METHODS": method for level in ("DEFAULT", "CLIENT")}
    result = in_pool(embedded, COUNT_JOBS, environment=claim)
    assert result.returncode != 0
    assert "HTCondorException" in result.stderr


def test_the_pool_accepts_no_other_user(embedded: EmbeddedEndpoint) -> None:
    """As root, become another user, who knows the address of the pool; its files are closed in any case."""
    assert in_pool(embedded, COUNT_JOBS_AS, str(os.geteuid())).returncode == 0
    if os.geteuid() == 0:
        result = in_pool(embedded, COUNT_JOBS_AS, str(pwd.getpwnam("nobody").pw_uid))
        assert result.returncode != 0
        assert "HTCondorException" in result.stderr
    assert embedded.condor_config is not None
    assert stat.S_IMODE(embedded.condor_config.parent.stat().st_mode) == 0o700


def test_root_needs_no_user_namespace(own: EmbeddedSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a container forbids them, the pool runs as another user, with leave to read root's files."""
    monkeypatch.setattr(module, "WAYS_FOR_ROOT", ("capability",))
    endpoint = ensure_running(own)
    master = psutil.Process(status(own)["processes"]["condor"])
    assert 0 not in master.uids()
    run_private_job(endpoint, tmp_path / "private")
    if os.geteuid() == 0:
        assert in_pool(endpoint, COUNT_JOBS_AS, str(pwd.getpwnam("nobody").pw_uid)).returncode != 0
    stop(own)
    assert living([master]) == []
    monkeypatch.undo()
    # The other way takes over the files of this one.
    run_private_job(ensure_running(own), tmp_path / "again")


def test_root_who_can_be_nobody_else_is_told(own: EmbeddedSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAYS_FOR_ROOT", ())
    if os.geteuid() == 0:
        with pytest.raises(EmbeddedError, match=r"no jobs as root.*run as an ordinary user"):
            ensure_running(own)
    else:
        assert module.identity_for_daemons() == "same"


def run_private_job(endpoint: EmbeddedEndpoint, private: Path) -> None:
    """Run a job that reads and writes where only its user may."""
    private.mkdir(mode=0o700)
    (private / "input").write_text("from a private directory")
    job = {
        "executable": sys.executable,
        "transfer_executable": "false",
        "arguments": f"-c print(open('{private}/input').read())",
        "output": str(private / "output"),
        "log": str(private / "log"),
        "request_memory": "50",
        "request_disk": "1MB",
    }
    result = in_pool(endpoint, SUBMIT, json.dumps(job), "1")
    assert result.returncode == 0, result.stderr
    until(lambda: "Job terminated" in (private / "log").read_text(), timeout=30)
    assert (private / "output").read_text() == "from a private directory\n"


def test_a_job_starts_soon_and_reads_what_its_user_can(embedded: EmbeddedEndpoint, tmp_path: Path) -> None:
    started = time.monotonic()
    run_private_job(embedded, tmp_path / "private")
    assert time.monotonic() - started < 10 * slowness()
    assert (tmp_path / "private" / "output").stat().st_uid == os.geteuid()


def test_down_is_quick_and_forgets_the_jobs(own: EmbeddedSettings, tmp_path: Path) -> None:
    endpoint = ensure_running(own)
    start_cluster(endpoint)
    job = {"executable": "/bin/sleep", "transfer_executable": "false", "arguments": "600", "log": str(tmp_path / "log"),
           "request_memory": "10", "request_disk": "1MB"}  # fmt: skip
    assert in_pool(endpoint, SUBMIT, json.dumps(job), "20").returncode == 0
    until(lambda: "Job executing" in (tmp_path / "log").read_text())
    processes = keeper_tree(own)
    assert any(process.name() == "sleep" for process in processes)
    started = time.monotonic()
    assert stop(own) is True
    assert time.monotonic() - started < 10 * slowness()
    assert living(processes) == []
    assert status(own)["phase"] == "stopped"
    assert stop(own) is False
    assert in_pool(ensure_running(own), COUNT_JOBS).stdout.strip() == "0"


def test_a_configured_pool_is_used_and_only_a_gateway_started(
    embedded: EmbeddedEndpoint, own: EmbeddedSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONDOR_CONFIG", str(embedded.condor_config))
    settings = EmbeddedSettings(directory=own.directory, idle_timeout=120)
    endpoint = ensure_running(settings)
    assert endpoint.condor_config is None
    report = status(settings)
    assert report["running"] is True
    assert set(report["processes"]) == {"gateway", "proxy"}
    assert report["pool"]["embedded"] is False
    assert report["pool"]["version"] == endpoint.versions["HTCondor"] == embedded.versions["HTCondor"]
    assert start_cluster(endpoint) in status(settings)["gateway"]["clusters"]


@pytest.mark.parametrize("given", ["a pool that is gone", "our own pool"])
def test_a_pool_that_does_not_answer_is_not_used(
    own: EmbeddedSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    gone = tmp_path / "gone"
    gone.write_text(f"LOCAL_DIR = {tmp_path}\nLOG = {tmp_path}\nCOLLECTOR_HOST = 127.0.0.1:9\nRELEASE_DIR = /usr\n")
    config = gone if given == "a pool that is gone" else Path(str(own.directory)) / "condor" / "condor_config"
    monkeypatch.setenv("CONDOR_CONFIG", str(config))
    settings = EmbeddedSettings(directory=own.directory, idle_timeout=120)
    endpoint = ensure_running(settings)
    assert endpoint.condor_config == Path(str(own.directory)) / "condor" / "condor_config"
    assert status(settings)["running"] is True


def test_disabled_is_an_error_that_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedError, match=r"embedded\.enabled is False"):
        ensure_running(EmbeddedSettings(directory=str(tmp_path), enabled=False))


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EmbeddedError, match=r"file.*embedded\.directory"):
        ensure_running(EmbeddedSettings(directory=str(tmp_path / "file")))


def test_sockets_go_elsewhere_where_the_path_is_too_long(tmp_path: Path) -> None:
    settings = EmbeddedSettings(directory=str(tmp_path / ("long-" * 20)), idle_timeout=120, use_configured_pool=False)
    try:
        endpoint = ensure_running(settings)
        assert in_pool(endpoint, COUNT_JOBS).stdout.strip() == "0"
        sockets = Path(json.loads((endpoint.directory / "state.json").read_text())["socket_directory"])
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
    finally:
        stop(settings)
    assert not sockets.exists()
