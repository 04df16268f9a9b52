"""The deployments as a user makes them: a real server, a process worker, and a scheduled run on HTCondor workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.states import Crashed, Running

from prefect_htcdask.condor.job_events import EventLogReader, JobRecord, JobTable
from prefect_htcdask.condor.schedd import ScheddClient
from prefect_htcdask.condor.submit_description import FlowRunTag
from prefect_htcdask.embedded import EmbeddedEndpoint
from prefect_htcdask.embedded.pool_query import query_pool
from prefect_htcdask.gateway import HTCGatewayCluster
from tests.support.cluster_fixtures import gateway_clusters, jobs_of
from tests.support.nanoaod import back_to_back, write_nanoaod
from tests.support.prefect_command import CHECKOUT, prefect, process_worker
from tests.support.prefect_fixtures import PrefectServer
from tests.support.waiting import PATIENCE, wait_until

pytestmark = pytest.mark.daemons


@pytest.fixture
def deployed(prefect_api: PrefectServer) -> Iterator[SyncPrefectClient]:
    prefect("work-pool", "create", "htcdask", "--type", "process", "--overwrite")
    prefect("deploy", "--prefect-file", "deployments/prefect.yaml", "--all")
    with get_client(sync_client=True) as client:
        yield client


def runs_of(client: SyncPrefectClient, deployment: str) -> list[FlowRun]:
    found = client.read_deployment_by_name(deployment)
    wanted = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[found.id]))
    return client.read_flow_runs(flow_run_filter=wanted)


def jobs_in_logs(runs: Path) -> list[JobRecord]:
    """The worker jobs that were given a slot, from HTCondor's event logs below a directory."""
    table = JobTable()
    for log in runs.glob("*/jobs.log"):
        reader = EventLogReader(log)
        reader.read(table)
        reader.close()
    return [record for record in table.records.values() if record.host]


def test_all_flows_deploy_with_their_schedules(deployed: SyncPrefectClient) -> None:
    nightly = deployed.read_deployment_by_name("dimuon/nightly")
    sweep = deployed.read_deployment_by_name("percolation/sweep")
    leftovers = deployed.read_deployment_by_name("sweep-leftovers/leftovers")
    assert [type(schedule.schedule) for schedule in nightly.schedules] == [CronSchedule]
    assert sweep.schedules == []
    (schedule,) = [one.schedule for one in leftovers.schedules]
    assert isinstance(schedule, CronSchedule) and schedule.cron == "*/15 * * * *"
    for deployment in (nightly, sweep, leftovers):
        (step,) = deployment.pull_steps or []
        assert step == {"prefect.deployments.steps.set_working_directory": {"directory": str(CHECKOUT)}}
    deadline = time.monotonic() + 60 * PATIENCE
    while not (runs := runs_of(deployed, "dimuon/nightly")):
        assert time.monotonic() < deadline, "the server scheduled no run of the cron schedule"
        time.sleep(0.5)
    assert all(run.auto_scheduled and run.expected_start_time is not None for run in runs)


@pytest.mark.timeout(1500)
def test_a_scheduled_run_completes_on_htcondor_workers(
    deployed: SyncPrefectClient,
    htcdask_environment: EmbeddedEndpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = tmp_path / "runs"
    monkeypatch.setenv("PREFECT_INTEGRATIONS_HTCDASK_CONDOR_DIRECTORY", str(runs))
    events = write_nanoaod(tmp_path / "run1.root", [back_to_back(91.2)] * 10)
    picture = tmp_path / "spectrum.png"
    deployment = deployed.read_deployment_by_name("dimuon/nightly")
    # The next of the cron schedule is at night, on a full second. Ours is soon; a server that is late with its plans
    # takes the one after it.
    soon = datetime.now(timezone.utc).replace(microsecond=500_000) + timedelta(seconds=12)
    schedule = IntervalSchedule(interval=timedelta(minutes=2), anchor_date=soon)
    parameters = {"inputs": [str(events)], "output": str(picture), "events_per_task": 5}
    deployed.create_deployment_schedules(deployment.id, [(schedule, True)], parameters=parameters)

    log = tmp_path / "worker.log"
    with process_worker(log) as worker:
        deadline = time.monotonic() + 240 * PATIENCE
        ended: list[FlowRun] = []
        while not ended:
            assert time.monotonic() < deadline and worker.poll() is None, log.read_text()
            time.sleep(0.5)
            ended = [
                run
                for run in runs_of(deployed, "dimuon/nightly")
                if run.state and run.state.is_final() and run.expected_start_time.microsecond == 500_000
            ]
    (run,) = ended
    assert run.state is not None and run.state.is_completed(), f"{run.state}\n{log.read_text()}"
    assert run.auto_scheduled and run.expected_start_time >= soon
    assert picture.exists()
    assert jobs_in_logs(runs), "no HTCondor job ran"
    pool = query_pool(str(htcdask_environment.condor_config))
    assert pool is not None and pool["jobs"]["total"] == 0


@pytest.mark.timeout(1500)
def test_the_deployed_sweep_removes_what_a_crashed_flow_run_left(
    deployed: SyncPrefectClient,
    new_cluster: Callable[..., HTCGatewayCluster],
    queue: ScheddClient,
    condor_environment: EmbeddedEndpoint,
    tmp_path: Path,
) -> None:
    @flow
    def nothing() -> None: ...

    crashed, running = deployed.create_flow_run(nothing), deployed.create_flow_run(nothing)
    deployed.set_flow_run_state(crashed.id, Crashed(), force=True)
    deployed.set_flow_run_state(running.id, Running(), force=True)
    left, kept = (
        new_cluster(flow_run=FlowRunTag(str(one.id), one.name, "nothing"), requirements="false")
        for one in (crashed, running)
    )
    left.scale(2)
    kept.scale(1)
    wait_until(lambda: len(jobs_of(queue)) == 3, 20, "the jobs are in the queue")
    deployment = deployed.read_deployment_by_name("sweep-leftovers/leftovers")
    log = tmp_path / "worker.log"
    with process_worker(log) as worker:
        for dry_run in (True, False):
            swept = deployed.create_flow_run_from_deployment(deployment.id, parameters={"dry_run": dry_run})
            deadline = time.monotonic() + 100 * PATIENCE
            while not ((state := deployed.read_flow_run(swept.id).state) and state.is_final()):
                assert time.monotonic() < deadline and worker.poll() is None, log.read_text()
                time.sleep(0.5)
            assert state.is_completed(), f"{state}\n{log.read_text()}"
            assert len(jobs_of(queue, left.name)) == (2 if dry_run else 0)
    assert "2 jobs" in log.read_text() and "its flow run is Crashed" in log.read_text()
    assert left.name not in gateway_clusters(condor_environment)
    assert len(jobs_of(queue, kept.name)) == 1 and kept.name in gateway_clusters(condor_environment)
