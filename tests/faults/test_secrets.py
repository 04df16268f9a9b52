"""Secrets are nowhere to be read: not in ads, arguments, environments, logs, or files that others may open."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from prefect_htcdask.condor.submit_description import cluster_digest
from tests.faults.arena import Arena
from tests.faults.flow_process import FlowProcess
from tests.faults.row import Row
from tests.support.secret_search import files, holding, readable
from tests.support.waiting import wait_until
from tools.prefect_server import prefect_server

pytestmark = [pytest.mark.pool, pytest.mark.faults]

NewFlow = Callable[..., FlowProcess]
LOGIN = "admin:the-key-of-the-Prefect-API"


def test_secrets_are_nowhere_to_be_read(
    arena: Arena, row: Row, new_flow: NewFlow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nothing broken: secrets looked for in ads, arguments, environments, sandbox and files, while it runs and after"""
    home = tmp_path / "client"
    home.mkdir(mode=0o700)
    profiles = home / "profiles.toml"
    profiles.touch(mode=0o600)
    profiles.write_text(f'active = "here"\n[profiles.here]\nPREFECT_API_AUTH_STRING = "{LOGIN}"\n')
    with monkeypatch.context() as patch:
        patch.setenv("PREFECT_SERVER_API_AUTH_STRING", LOGIN)
        running = prefect_server(tmp_path / "server")
        server = running.__enter__()
    try:
        own = {**server.environment, "PREFECT_HOME": str(home), "PREFECT_PROFILES_PATH": str(profiles)}
        flow = new_flow(own).start().compute()
        (cluster,) = arena.clusters()
        runs = arena.runs / cluster_digest(cluster)
        staging = runs / "staging"
        (key,) = staging.rglob("dask.pem")
        secrets = {
            "password of the gateway": arena.endpoint.password,
            "key of the Prefect API": LOGIN.partition(":")[2],
            "key of the Prefect API, encoded": base64.b64encode(LOGIN.encode()).decode(),
            "TLS key": key.read_text().splitlines()[3],
        }
        scheduler = arena.scheduler_of(cluster)
        token = scheduler.environ().get("DASK_GATEWAY_API_TOKEN")
        if token and not Path(token).exists():
            secrets["token of the scheduler"] = token

        ads = arena.condor("condor_q", "-allusers", "-long").stdout
        assert "PrefectFlowRunId" in ads
        row.expect(not holding(ads, secrets), f"in the ad: {holding(ads, secrets)}")

        worker = psutil.Process(flow.runs("g0"))
        guard = worker.parent()
        assert guard is not None
        ours = [psutil.Process(flow.pid), flow.supervisor, worker, guard]
        ours += [one for one in psutil.Process(arena.pid_of("condor")).children(recursive=True)]
        for process in ours:
            with suppress(psutil.NoSuchProcess):
                found = holding(Path(f"/proc/{process.pid}/environ").read_text(errors="replace"), secrets)
                row.expect(not found, f"in the environment of {process.name()} ({process.pid}): {found}")
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                found = holding(" ".join(process.cmdline()), secrets)
                row.expect(not found, f"in the arguments of {process.name()}: {found}")

        embedded = arena.endpoint.directory
        sandbox = Path(worker.environ()["_CONDOR_SCRATCH_DIR"])
        assert sandbox.is_relative_to(embedded)
        everywhere = (arena.runs, embedded, home, flow.directory)
        row.expect(not (bad := readable(files(*everywhere), secrets)), f"files while it runs: {bad}")
        row.expect(not list(sandbox.rglob("worker_secrets.json")), "the worker left its secrets in the sandbox")
        for directory in (runs, staging, *(path for path in staging.iterdir() if path.is_dir())):
            mode = directory.stat().st_mode & 0o777
            row.expect(mode == 0o700, f"{directory} has mode {mode:o}")
        staged = [path for path in files(staging) if holding(path.read_bytes().decode(errors="replace"), secrets)]
        row.expect(sorted({path.name for path in staged}) == ["dask.pem", "worker_secrets.json"], f"staged: {staged}")

        flow.let_go()
        row.expect(flow.wait(90) == 0, f"the flow failed: {flow.tail(5)}")
        row.gone(arena, flow.said("ended")["time"], 20, 20)
        wait_until(lambda: not sandbox.exists(), 20, "the sandbox is removed")
        row.expect(not staging.exists(), "staging is left")
        history = arena.condor("condor_history", "-long").stdout
        assert flow.flow_run_id in history
        row.expect(not holding(history, secrets), f"in the history: {holding(history, secrets)}")
        row.expect(not (bad := readable(files(*everywhere), secrets)), f"files afterwards: {bad}")
        left = [path for path in files(arena.runs) if holding(path.read_bytes().decode(errors="replace"), secrets)]
        row.expect(not left, f"secrets are left in {left}")
        row.judge(dataclasses.replace(arena, server=server, login=LOGIN), [flow], ["Completed"], again=0)
    finally:
        running.__exit__(None, None, None)
    row.check()
