"""The sweep, the list of jobs and the doctor, on the real pool, gateway and Prefect server."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import Completed, Running, State

from prefect_htcdask.condor.worker_job import FlowRunTag
from prefect_htcdask.doctor import examine
from prefect_htcdask.gateway import HTCGatewayCluster
from prefect_htcdask.settings import load_settings
from prefect_htcdask.sweep import find_leftovers, sweep
from prefect_htcdask.worker_jobs import WorkerJob, worker_jobs
from tests.prefect_fixtures import PrefectServer
from tests.test_cli import run
from tests.waiting import wait_until


def job(job_id: str, flow_run_id: str, attempt: int = 1) -> WorkerJob:
    return WorkerJob(
        job_id, "idle", "", 0.0, None, "", "batch", f"cluster-{attempt}", "default", flow_run_id, attempt, 0.0
    )


def flow_run(state: State[Any] | None, run_count: int = 1) -> FlowRun:
    return FlowRun(flow_id=uuid.uuid4(), state=state, run_count=run_count)


def test_jobs_of_a_running_flow_run_are_kept() -> None:
    assert find_leftovers([job("1.0", "a")], {"a": flow_run(Running())}) == []


def test_jobs_of_a_flow_run_that_is_over_are_left_over() -> None:
    (leftover,) = find_leftovers([job("1.0", "a"), job("1.1", "a")], {"a": flow_run(Completed())})
    assert leftover.job_ids == ("1.0", "1.1")
    assert "Completed" in leftover.why
    assert leftover.before_attempt is None


def test_jobs_of_an_unknown_flow_run_are_left_over() -> None:
    (leftover,) = find_leftovers([job("1.0", "a")], {})
    assert "does not know" in leftover.why


def test_only_earlier_attempts_of_a_retried_flow_run_are_left_over() -> None:
    jobs = [job("1.0", "a", attempt=1), job("2.0", "a", attempt=2)]
    (leftover,) = find_leftovers(jobs, {"a": flow_run(Running(), run_count=2)})
    assert leftover.job_ids == ("1.0",)
    assert leftover.before_attempt == 2
    assert leftover.clusters == ("cluster-1",)


@pytest.mark.pool
def test_sweep_removes_jobs_and_cluster_of_an_unknown_flow_run(
    new_cluster: Callable[..., HTCGatewayCluster], prefect_server: PrefectServer
) -> None:
    tag = FlowRunTag(str(uuid.uuid4()), "lost run", "lost flow")
    cluster = new_cluster(flow_run=tag, requirements="false")
    cluster.scale(3)
    other = new_cluster(requirements="false")
    other.scale(1)
    settings = load_settings()
    wait_until(lambda: len(worker_jobs(cluster.parts)) == 4, 20, "the jobs are in the queue")
    assert {found.flow_run_id for found in worker_jobs(cluster.parts, tag.id)} == {tag.id}

    listed = run("jobs", "--json")
    assert listed.returncode == 0, listed.stderr
    assert len(json.loads(listed.stdout)) == 4

    dry = sweep(settings, dry_run=True)
    assert [leftover.flow_run_id for leftover in dry.leftovers] == [tag.id]
    assert dry.jobs_removed == 0
    assert len(worker_jobs(cluster.parts, tag.id)) == 3

    swept = run("sweep", "--json")
    assert swept.returncode == 0, swept.stderr
    report = json.loads(swept.stdout)
    assert report["jobs_removed"] == 3
    assert report["clusters_stopped"] == [cluster.name]
    # What belongs to no flow run is not the sweep's: its own lease looks after it.
    wait_until(lambda: [found.cluster for found in worker_jobs(other.parts)] == [other.name], 20, "one job is left")
    assert sweep(settings).leftovers == []


@pytest.mark.pool
def test_sweep_removes_nothing_when_the_api_is_out_of_reach(
    new_cluster: Callable[..., HTCGatewayCluster], prefect_server: PrefectServer
) -> None:
    cluster = new_cluster(flow_run=FlowRunTag(str(uuid.uuid4()), "run", "flow"), requirements="false")
    cluster.scale(1)
    wait_until(lambda: len(worker_jobs(cluster.parts)) == 1, 20, "the job is in the queue")
    refused = run("sweep", PREFECT_API_URL="http://127.0.0.1:9/api")
    assert refused.returncode == 1
    assert "PREFECT_API_URL" in refused.stderr
    assert len(worker_jobs(cluster.parts)) == 1


@pytest.mark.pool
def test_doctor_finds_every_link_well(condor_environment: object, prefect_server: PrefectServer) -> None:
    findings = list(examine(load_settings(worker={"memory": "300 MiB", "disk": "100 MiB"})))
    assert [finding for finding in findings if not finding.ok] == []
    assert len(findings) == 7
    assert httpx.get(f"{prefect_server.url}/health").status_code == 200
    assert prefect_server.url in findings[-2].detail


@pytest.mark.pool
def test_doctor_names_the_link_that_is_broken(condor_environment: object, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(worker={"python": "/nonexistent/python", "memory": "300 MiB", "disk": "100 MiB"})
    findings = list(examine(settings))
    assert [finding.ok for finding in findings] == [True, True, True, False]
    assert "3 workers in a row" in findings[-1].detail
    assert "/nonexistent/python" in findings[-1].detail
