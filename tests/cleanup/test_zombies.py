"""Flow runs that nothing can end any more, and subflow runs that went with them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelled, Cancelling, Completed, Crashed, Failed, Pending, Running, Scheduled, State

from prefect_htcdask.cleanup import zombies
from prefect_htcdask.cleanup.ownership import Liveness
from prefect_htcdask.cleanup.sweep import sweep
from prefect_htcdask.cleanup.zombies import GRACE, ZombieFlowRun, zombie_reason, zombie_reason_with
from prefect_htcdask.condor.submit_description import FlowRunTag
from prefect_htcdask.gateway.run_directory import (
    ClusterRecord,
    ClusterTrace,
    _this_host,
    cluster_traces,
    record_cluster,
)
from prefect_htcdask.settings import load_settings
from tests.support.plain_flow import unfinished
from tests.support.prefect_fixtures import nothing
from tests.support.waiting import wait_until

NOW = time.time()
LONG_AGO = NOW - GRACE - 60
WHEN = {"now": NOW, "long ago": LONG_AGO}


def run_of(state: State[Any], since: float = LONG_AGO, **more: Any) -> FlowRun:
    state = state.model_copy(update={"timestamp": datetime.fromtimestamp(since, timezone.utc)})
    return FlowRun(id=uuid.uuid4(), flow_id=uuid.uuid4(), state=state, state_type=state.type, run_count=1, **more)


def subflow_run(state: State[Any], **more: Any) -> FlowRun:
    return run_of(state, parent_task_run_id=uuid.uuid4(), **more)


def record_of(flow_run: FlowRun, process: str) -> ClusterRecord:
    """That a flow run's process ran here and lives or is dead, or ran elsewhere."""
    alive = psutil.Process()
    host = "elsewhere" if process == "elsewhere" else _this_host()
    started = alive.create_time() - (1000 if process == "dead" else 0)
    name = f"cluster-{flow_run.id}"
    return ClusterRecord(name, str(flow_run.id), "run", 1, "", 180.0, host, os.getpid(), started)


def signs_of(*pairs: tuple[FlowRun, str], renewed: float = LONG_AGO) -> Liveness:
    records = [record_of(*pair) for pair in pairs]
    traces = {record.cluster: ClusterTrace(record.cluster, renewed, record) for record in records}
    return Liveness([], records, traces, 180.0, NOW)


@pytest.mark.parametrize(
    ("state", "since", "process", "renewed", "is_abandoned"),
    [
        (Running(), "now", "dead", "now", True),
        (Running(), "long ago", "elsewhere", "long ago", False),
        (Running(), "long ago", "alive", "long ago", False),
        (Cancelling(), "now", "dead", "now", True),
        (Cancelling(), "long ago", "elsewhere", "long ago", True),
        (Cancelling(), "now", "elsewhere", "long ago", False),
        (Cancelling(), "long ago", "elsewhere", "now", False),
        (Cancelling(), "long ago", "alive", "long ago", False),
        (Scheduled(), "long ago", "dead", "long ago", False),
        (Completed(), "long ago", "dead", "long ago", False),
    ],
)
def test_which_flow_runs_are_abandoned(
    state: State[Any], since: str, process: str, renewed: str, is_abandoned: bool
) -> None:
    flow_run = run_of(state, WHEN[since])
    assert bool(zombie_reason(flow_run, signs_of((flow_run, process), renewed=WHEN[renewed]), NOW)) is is_abandoned


@pytest.mark.parametrize(
    ("parent", "since", "process", "is_abandoned"),
    [
        (Crashed(), "now", "dead", True),
        (Crashed(), "long ago", "elsewhere", True),
        (Crashed(), "now", "elsewhere", False),
        (Crashed(), "long ago", "alive", False),
        (Cancelled(), "long ago", "elsewhere", True),
        # Its process may go on in a thread, or wait for what nobody awaited.
        (Completed(), "long ago", "elsewhere", False),
        (Failed(), "long ago", "elsewhere", False),
        (Completed(), "now", "dead", True),
        (Running(), "long ago", "elsewhere", False),
    ],
)
@pytest.mark.parametrize("state", [Running(), Pending(), Cancelling()], ids=lambda state: state.name)
def test_which_subflow_runs_went_with_their_parent(
    parent: State[Any], since: str, process: str, is_abandoned: bool, state: State[Any]
) -> None:
    whole, part = run_of(parent, WHEN[since]), subflow_run(state)
    assert bool(zombie_reason_with(whole, None, part, signs_of((whole, process)), NOW)) is is_abandoned
    # Whatever becomes of its parent, one whose own process lives does.
    assert not zombie_reason_with(whole, None, part, signs_of((whole, process), (part, "alive")), NOW)


@pytest.mark.parametrize(
    "more", [{"deployment_id": uuid.UUID(int=1)}, {"work_pool_name": "k8s"}, {"infrastructure_pid": "1"}]
)
def test_a_run_of_a_deployment_outlives_its_parent(more: dict[str, Any]) -> None:
    whole = run_of(Crashed())
    signs = signs_of((whole, "dead"))
    assert not zombie_reason_with(whole, None, subflow_run(Running(), **more), signs, NOW)
    assert zombie_reason_with(whole, None, subflow_run(Running()), signs, NOW)
    assert not zombie_reason_with(whole, None, run_of(Running()), signs, NOW), "it is no subflow run"


def test_a_lease_that_runs_is_a_sign_of_life() -> None:
    whole, part = run_of(Crashed()), subflow_run(Running())
    assert not zombie_reason_with(whole, None, part, signs_of((whole, "elsewhere"), renewed=NOW), NOW)


def test_subflow_runs_of_an_abandoned_one_go_with_it() -> None:
    whole, part = run_of(Running()), subflow_run(Running())
    signs = signs_of((whole, "dead"))
    assert "its process is gone" in zombie_reason_with(
        whole, ZombieFlowRun(whole, "its process is gone"), part, signs, NOW
    )


# On a real Prefect server


FAMILY = """
import os, sys
from pathlib import Path
from prefect import flow, task
from prefect.runtime import flow_run
from prefect_htcdask.condor.submit_description import FlowRunTag
from prefect_htcdask.gateway.run_directory import record_cluster

@task
def endless():
    Path(sys.argv[2]).touch()
    import time
    time.sleep(300)

@flow
def grandchild():
    endless()

@flow
def child():
    grandchild()

@flow
def parent():
    # As a task runner of ours does.
    record_cluster(Path(sys.argv[1]) / "cluster-1", FlowRunTag(str(flow_run.id), "run", "parent"), lease=180.0)
    child()

parent()
"""


def test_a_killed_process_s_subflow_runs_are_ended(
    api: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flow runs three deep in one process, of which only the first has a task runner of ours."""
    monkeypatch.setenv("PREFECT_INTEGRATIONS_HTCDASK_EMBEDDED_DIRECTORY", str(tmp_path / "none"))
    monkeypatch.setenv("PREFECT_INTEGRATIONS_HTCDASK_EMBEDDED_USE_CONFIGURED_POOL", "false")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_HTCDASK_CONDOR_DIRECTORY", str(tmp_path / "runs"))
    computes = tmp_path / "computes"
    process = subprocess.Popen([sys.executable, "-c", FAMILY, str(tmp_path / "runs"), str(computes)], cwd=tmp_path)
    try:
        wait_until(computes.exists, 90, "the task runs")
        (trace,) = cluster_traces(load_settings(), since=0)
        assert trace.record is not None
        runs = family(api, trace.record.flow_run_id)
        assert [run.state_name for run in runs] == ["Running"] * 3
        independent = api.create_flow_run(nothing, parent_task_run_id=runs[1].parent_task_run_id, state=Running())
        api.set_flow_run_state(independent.id, Running(), force=True)
        with httpx.Client(base_url=str(api.api_url)) as plain:
            # As the worker of a pool does.
            plain.patch(f"/flow_runs/{independent.id}", json={"infrastructure_pid": "n1:1"}).raise_for_status()
        assert not sweep(load_settings(), dry_run=True).found, "it lives"
    finally:
        process.kill()
        process.wait(10)
    dry = sweep(load_settings(), dry_run=True)
    assert sorted(dry.abandoned) == sorted(str(run.id) for run in runs)
    swept = sweep(load_settings())
    assert swept.all_is_well and swept.flow_runs_ended == 3, swept
    ended = family(api, trace.record.flow_run_id)
    assert [run.state_name for run in ended] == ["Crashed"] * 3
    assert "is part of" in str(ended[2].state and ended[2].state.message)
    assert [unfinished(api, str(run.id)) for run in ended] == [[], [], []]
    assert api.read_flow_run(independent.id).state_name == "Running", "a run in a process of its own"
    assert not sweep(load_settings()).found


def test_cancelling_for_long_is_cancelled(
    api: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process was on another host, which is gone."""
    monkeypatch.setenv("PREFECT_INTEGRATIONS_HTCDASK_EMBEDDED_DIRECTORY", str(tmp_path / "none"))
    monkeypatch.setenv("PREFECT_INTEGRATIONS_HTCDASK_EMBEDDED_USE_CONFIGURED_POOL", "false")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_HTCDASK_CONDOR_DIRECTORY", str(tmp_path / "runs"))
    monkeypatch.setattr(zombies, "GRACE", 1.0)
    runs = {}
    for name, renewed in (("lost", LONG_AGO), ("living", time.time())):
        run = api.create_flow_run(nothing)
        api.set_flow_run_state(run.id, Running(), force=True)
        api.set_flow_run_state(run.id, Cancelling(), force=True)
        directory = tmp_path / "runs" / name
        record_cluster(directory, FlowRunTag(str(run.id), name, "nothing"), lease=180.0)
        record = directory / "cluster.json"
        record.write_text(record.read_text().replace(os.uname().nodename, "another-host"))
        os.utime(directory, times=(renewed, renewed))
        runs[name] = run.id
    wait_until(lambda: sweep(load_settings(), dry_run=True).abandoned, 20, "it was to be cancelled for long enough")
    dry = sweep(load_settings(), dry_run=True)
    assert list(dry.abandoned) == [str(runs["lost"])] and "it was to be cancelled" in "\n".join(dry.lines())
    assert sweep(load_settings()).flow_runs_ended == 1
    assert api.read_flow_run(runs["lost"]).state_name == "Cancelled"
    assert api.read_flow_run(runs["living"]).state_name == "Cancelling"


def family(api: SyncPrefectClient, first: str) -> list[FlowRun]:
    """A flow run, its subflow run and that one's."""
    found = [api.read_flow_run(uuid.UUID(first))]
    for _ in range(2):
        only = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[found[-1].id]))
        found += [run for run in api.read_flow_runs(flow_run_filter=only) if run.infrastructure_pid is None]
    return found
