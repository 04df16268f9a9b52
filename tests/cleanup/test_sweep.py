"""The sweep and the list of jobs, on the real pool, gateway and Prefect server."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dask_gateway import Gateway
from dask_gateway.auth import BasicAuth
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.states import Completed, Crashed, Running, State

from prefect_htcdask.cleanup.jobs import WorkerJob, worker_jobs
from prefect_htcdask.cleanup.orphans import find_orphans
from prefect_htcdask.cleanup.ownership import Liveness
from prefect_htcdask.cleanup.sweep import sweep
from prefect_htcdask.condor.schedd import ScheddClient
from prefect_htcdask.condor.submit_description import FlowRunTag, cluster_digest
from prefect_htcdask.embedded import EmbeddedEndpoint
from prefect_htcdask.gateway import HTCGatewayCluster
from prefect_htcdask.gateway.run_directory import ClusterRecord, cluster_traces, record_cluster, run_directory
from prefect_htcdask.settings import load_settings
from tests.support.cluster_fixtures import Stopwatch, gateway_clusters, jobs_of
from tests.support.command_line import run
from tests.support.plain_flow import PlainFlow, unfinished
from tests.support.prefect_fixtures import PrefectServer, nothing
from tests.support.waiting import wait_until


def job(job_id: str, flow_run_id: str, attempt: int = 1, lease_expires: float = 0.0) -> WorkerJob:
    return WorkerJob(
        job_id, "idle", "", 0.0, None, "", "batch", f"cluster-{attempt}", "default", flow_run_id, attempt, lease_expires
    )


def flow_run(state: State[Any] | None, run_count: int = 1) -> FlowRun:
    return FlowRun(flow_id=uuid.uuid4(), state=state, run_count=run_count)


def record_of(cluster: str, flow_run_id: str, attempt: int = 1, **more: Any) -> ClusterRecord:
    fields = {"api_url": "", "lease": 100.0, "host": "elsewhere", "pid": 1, "started": 0.0, **more}
    return ClusterRecord(cluster=cluster, flow_run_id=flow_run_id, flow_run_name="run", attempt=attempt, **fields)


def test_jobs_of_a_running_flow_run_are_kept() -> None:
    assert find_orphans([job("1.0", "a")], {"a": flow_run(Running())}) == []


def test_jobs_of_a_flow_run_that_is_over_are_left_over() -> None:
    (leftover,) = find_orphans([job("1.0", "a"), job("1.1", "a")], {"a": flow_run(Completed())})
    assert leftover.job_ids == ("1.0", "1.1")
    assert "Completed" in leftover.why
    assert leftover.before_attempt is None


def test_jobs_of_an_unknown_flow_run_are_left_over() -> None:
    (leftover,) = find_orphans([job("1.0", "a")], {})
    assert "does not know" in leftover.why
    assert find_orphans([job("1.0", "a")], {}, kept=["a"]) == []


def test_a_job_s_word_on_its_cluster_is_not_taken_against_the_cluster_s_record() -> None:
    """The ad of a job is written by whoever submits it."""
    runs = {"over": flow_run(Completed()), "runs": flow_run(Running(), run_count=2)}
    theirs, other = record_of("cluster-1", "runs", 2), record_of("cluster-2", "over", 2)
    jobs = [job("1.0", "over", attempt=1), job("1.1", "over", attempt=2), job("1.2", "over", attempt=3)]
    (leftover,) = find_orphans(jobs, runs, records=[theirs, other])
    assert leftover.clusters == ("cluster-2", "cluster-3"), "of the third no record tells"
    assert leftover.job_ids == ("1.0", "1.1", "1.2")


def test_only_earlier_attempts_of_a_retried_flow_run_are_left_over() -> None:
    jobs = [job("1.0", "a", attempt=1), job("2.0", "a", attempt=2)]
    (leftover,) = find_orphans(jobs, {"a": flow_run(Running(), run_count=2)})
    assert leftover.job_ids == ("1.0",)
    assert leftover.before_attempt == 2
    assert leftover.clusters == ("cluster-1",)


def test_gateway_clusters_without_a_job_are_left_over_too() -> None:
    clusters = [record_of("x", "a", 1), record_of("y", "a", 2), record_of("z", "b")]
    runs = {"a": flow_run(Running(), run_count=2), "b": flow_run(Crashed())}
    first, second = find_orphans([], runs, clusters)
    assert (first.flow_run_id, first.clusters, first.job_ids) == ("a", ("x",), ())
    assert (second.flow_run_id, second.clusters, second.before_attempt) == ("b", ("z",), None)


def test_an_abandoned_flow_run_s_are_left_over() -> None:
    runs = {"a": flow_run(Running())}
    (leftover,) = find_orphans([job("1.0", "a")], runs, abandoned=["a"])
    assert leftover.job_ids == ("1.0",) and "process" in leftover.why and leftover.before_attempt is None


def test_signs_of_life() -> None:
    now = time.time()
    jobs = [job("1.0", "leased", lease_expires=now + 10), job("2.0", "lapsed", lease_expires=now - 1)]
    signs = Liveness(jobs, [record_of("x", "b", api_url="http://other/api")], {}, lease=100, now=now)
    assert signs.lease_valid("leased") and not signs.lease_valid("lapsed") and not signs.lease_valid("unheard of")
    assert not signs.process_is_dead("leased") and not signs.process_is_dead("b"), "of another host nothing is known"
    assert signs.other_api("b", "http://ours/api") == "http://other/api"
    assert signs.other_api("b", "http://other/api") == signs.other_api("leased", "http://ours/api") == ""


def test_a_cluster_s_record(tmp_path: Path) -> None:
    settings = load_settings(condor={"directory": str(tmp_path / "runs")})
    assert cluster_traces(settings, since=0) == []
    code = """
        import sys
        from pathlib import Path
        from prefect_htcdask.condor.submit_description import FlowRunTag
        from prefect_htcdask.gateway.run_directory import record_cluster
        record_cluster(Path(sys.argv[1]), FlowRunTag("a", "n", "f", 2, "http://x/api"), lease=9.0)
    """
    directory = run_directory(settings, "cluster-1")
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(directory)], check=True)
    record_cluster(directory.parent / "cluster-2", FlowRunTag("b", "", "f"), lease=9.0)
    (directory.parent / "cluster-3").mkdir()
    (directory.parent / "cluster-4").mkdir()
    (directory.parent / "cluster-4" / "cluster.json").write_text("{")
    (directory.parent / "supervisor-1.log").touch()
    assert (directory / "cluster.json").stat().st_mode & 0o777 == 0o600
    assert directory.stat().st_mode & 0o777 == 0o700
    records = {trace.cluster: trace.record for trace in cluster_traces(settings, since=0)}
    assert sorted(records) == ["cluster-1", "cluster-2", "cluster-3", "cluster-4"]
    assert records["cluster-3"] is None and records["cluster-4"] is None
    dead, alive = records["cluster-1"], records["cluster-2"]
    assert dead is not None and (dead.flow_run_id, dead.attempt, dead.api_url) == ("a", 2, "http://x/api")
    assert dead.process_lives() is False, "its process has ended"
    assert alive is not None and alive.process_lives() is True
    signs = Liveness([], [dead, alive], {}, 100, time.time())
    assert signs.process_is_dead("a") and signs.process_is_dead("a", 2) and not signs.process_is_dead("b")
    assert not signs.process_is_dead("a", 3), "of a later attempt nothing is known"
    # What somebody copied elsewhere says nothing of this directory.
    (directory.parent / "cluster-3" / "cluster.json").write_bytes((directory / "cluster.json").read_bytes())
    assert {trace.cluster: trace.record for trace in cluster_traces(settings, since=0)}["cluster-3"] is None
    assert cluster_traces(settings, since=time.time() + 60) == []


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

    # Its exit status says that no slot takes them, once the pool has told of its slots.
    listed = run("jobs", "--json")
    assert len(json.loads(listed.stdout)) == 4, listed.stderr

    dry = sweep(settings, dry_run=True)
    assert [leftover.flow_run_id for leftover in dry.leftovers] == [tag.id]
    assert dry.jobs_removed == 0 and dry.found and not dry.all_is_well
    assert len(worker_jobs(cluster.parts, tag.id)) == 3

    swept = run("sweep", "--json")
    assert swept.returncode == 0, swept.stderr
    report = json.loads(swept.stdout)
    assert report["jobs_removed"] == 3
    assert report["clusters_stopped"] == [cluster.name]
    # What belongs to no flow run is not the sweep's: its own lease looks after it.
    wait_until(
        lambda: [found.cluster for found in worker_jobs(other.parts)] == [cluster_digest(other.name)],
        20,
        "one job is left",
    )
    after = sweep(settings)
    assert after.leftovers == [] and after.all_is_well


@pytest.mark.pool
def test_sweep_stops_clusters_without_jobs_and_only_those_of_flow_runs(
    new_cluster: Callable[..., HTCGatewayCluster], condor_environment: EmbeddedEndpoint, api: SyncPrefectClient
) -> None:
    over, running, foreign = (api.create_flow_run(nothing) for _ in range(3))
    api.set_flow_run_state(over.id, Completed(), force=True)
    api.set_flow_run_state(running.id, Running(), force=True)
    elsewhere = str(uuid.uuid4())
    clusters = {}
    for key, flow_run_id, url in (
        ("over", str(over.id), ""),
        ("running", str(running.id), ""),
        ("elsewhere", elsewhere, "http://192.0.2.1:4200/api"),
    ):
        # It is recorded as it starts.
        clusters[key] = new_cluster(flow_run=FlowRunTag(flow_run_id, key, "nothing", api=url)).name
    with Gateway(
        condor_environment.gateway_address,
        proxy_address=condor_environment.proxy_address,
        auth=BasicAuth(condor_environment.username, condor_environment.password),
    ) as gateway:
        clusters["stock"] = gateway.submit()
        try:
            dry = run("sweep", "--dry-run")
            assert dry.returncode == 1, dry.stderr
            assert "over: 0 jobs and 1 gateway clusters would be removed: its flow run is Completed" in dry.stdout
            spared = (
                "0 jobs and 1 gateway clusters belong to 1 flow runs of the Prefect API at http://192.0.2.1:4200/api"
            )
            assert f"{spared}; sweep with that API's settings" in dry.stdout
            swept = run("sweep", "--json")
            assert swept.returncode == 0, swept.stderr
            report = json.loads(swept.stdout)
            assert report["clusters_stopped"] == [clusters["over"]]
            assert report["kept"] == []
            (other,) = report["other_apis"]
            assert (other["flow_run_ids"], other["jobs"], other["clusters"]) == ([elsewhere], 0, 1)
            left = set(gateway_clusters(condor_environment))
            assert {clusters["running"], clusters["elsewhere"], clusters["stock"]} <= left
            assert clusters["over"] not in left
        finally:
            gateway.stop_cluster(clusters["stock"])
    assert api.read_flow_run(foreign.id).state is not None


@pytest.mark.pool
def test_sweep_removes_nothing_when_the_api_is_out_of_reach(
    new_cluster: Callable[..., HTCGatewayCluster], prefect_server: PrefectServer
) -> None:
    cluster = new_cluster(flow_run=FlowRunTag(str(uuid.uuid4()), "run", "flow"), requirements="false")
    cluster.scale(1)
    wait_until(lambda: len(worker_jobs(cluster.parts)) == 1, 20, "the job is in the queue")
    for environment, word in (
        ({"PREFECT_API_URL": "http://127.0.0.1:9/api"}, "cannot be reached"),
        ({"PREFECT_API_URL": f"{prefect_server.url}/nowhere"}, "answers with status 404"),
        ({"PREFECT_API_URL": "", "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false"}, "no Prefect API can be had"),
    ):
        refused = run("sweep", **environment)
        assert refused.returncode == 1
        assert "PREFECT_API_URL" in refused.stderr and word in refused.stderr
        assert "Traceback" not in refused.stderr and len(refused.stderr.strip().splitlines()) == 1
        assert refused.stdout == ""
    assert len(worker_jobs(cluster.parts)) == 1


def test_sweep_names_the_key_that_is_wrong(
    tmp_path: Path, prefect_server: PrefectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tools.prefect_server import prefect_server as running_server

    monkeypatch.setenv("PREFECT_INTEGRATIONS_HTCDASK_EMBEDDED_DIRECTORY", str(tmp_path / "none"))
    monkeypatch.setenv("PREFECT_INTEGRATIONS_HTCDASK_CONDOR_DIRECTORY", str(tmp_path / "runs"))
    record_cluster(tmp_path / "runs" / "a", FlowRunTag(str(uuid.uuid4()), "", "f"), lease=180.0)
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "admin:right")
    with running_server(tmp_path / "server") as guarded:
        environment = {**guarded.environment, "PREFECT_API_AUTH_STRING": "admin:wrong"}
        refused = run("sweep", **environment)
        assert refused.returncode == 1
        assert "does not let us in (401)" in refused.stderr and "PREFECT_API_KEY" in refused.stderr
        right = run("sweep", **{**environment, "PREFECT_API_AUTH_STRING": "admin:right"})
        assert (right.returncode, right.stdout) == (0, "nothing is left over\n"), right.stderr


# Everything killed at once


@pytest.fixture
def processes(condor_environment: EmbeddedEndpoint, api: SyncPrefectClient) -> Iterator[list[PlainFlow]]:
    made: list[PlainFlow] = []
    yield made
    for one in made:
        one.end()


@pytest.mark.pool
@pytest.mark.timeout(240)
def test_sweep_after_everything_was_killed(
    processes: list[PlainFlow],
    queue: ScheddClient,
    condor_environment: EmbeddedEndpoint,
    api: SyncPrefectClient,
    tmp_path: Path,
) -> None:
    lost, other = PlainFlow(tmp_path, "lost"), PlainFlow(tmp_path, "other")
    processes += [lost, other]
    for one in (lost, other):
        one.wait_until_it_computes()
    lost.kill_all()
    # What Prefect's supervising process would do, or an automation that watches heartbeats.
    api.set_flow_run_state(uuid.UUID(lost.flow_run_id), Crashed(), force=True)
    wait_until(lambda: len(unfinished(api, lost.flow_run_id)) == 2, 20, "two task runs are unfinished in the API")
    assert len(jobs_of(queue, lost.cluster)) == 1, "the jobs are left for the lease"
    before = jobs_of(queue, other.cluster)

    dry = run("sweep", "--dry-run", "--json")
    assert dry.returncode == 1, dry.stderr
    report = json.loads(dry.stdout)
    assert [one["flow_run_id"] for one in report["leftovers"]] == [lost.flow_run_id]
    assert report["unfinished_task_runs"] == {lost.flow_run_id: 2}
    assert len(jobs_of(queue, lost.cluster)) == 1 and len(unfinished(api, lost.flow_run_id)) == 2

    watch = Stopwatch()
    parallel = [
        subprocess.Popen([sys.executable, "-m", "prefect_htcdask.cli", "sweep", "--json"], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    reports = [json.loads(one.communicate(timeout=120)[0]) for one in parallel]
    print(f"two sweeps at once after SIGKILL of flow and supervisor: {watch():.1f} s")
    assert [one.returncode for one in parallel] == [0, 0], reports
    assert jobs_of(queue, lost.cluster) == []
    assert lost.cluster not in gateway_clusters(condor_environment)
    assert unfinished(api, lost.flow_run_id) == []
    assert 2 <= sum(report["task_runs_ended"] for report in reports) <= 4
    wanted = FlowRunFilter(id=FlowRunFilterId(any_=[uuid.UUID(lost.flow_run_id)]))
    states = [task_run.state for task_run in api.read_task_runs(flow_run_filter=wanted)]
    assert len(states) == 2
    for state in states:
        assert state is not None and state.type == StateType.CRASHED
        assert "sweep" in str(state.message) and "Crashed" in str(state.message)
    # The other flow run's are untouched.
    assert jobs_of(queue, other.cluster) == before and other.process.poll() is None
    assert len(unfinished(api, other.flow_run_id)) == 2
    assert other.cluster in gateway_clusters(condor_environment)
    assert run("sweep").stdout == "nothing is left over\n"


@pytest.mark.pool
@pytest.mark.timeout(240)
def test_sweep_ends_a_flow_run_whose_process_is_gone(
    processes: list[PlainFlow],
    queue: ScheddClient,
    condor_environment: EmbeddedEndpoint,
    api: SyncPrefectClient,
    tmp_path: Path,
) -> None:
    """Nobody tells Prefect of the end of a plain ``python flow.py`` that was killed."""
    lost = PlainFlow(tmp_path, "lost", "--record")
    processes.append(lost)
    lost.wait_until_it_computes()
    wait_until(lambda: len(unfinished(api, lost.flow_run_id)) == 2, 20, "two task runs are unfinished in the API")
    alive = sweep(load_settings(), dry_run=True)
    assert not alive.found and alive.kept == [], "its process lives"
    lost.kill_all()
    assert sweep(load_settings(), dry_run=True).abandoned == {lost.flow_run_id: "its process is gone"}
    watch = Stopwatch()
    swept = sweep(load_settings())
    print(f"sweep after SIGKILL of flow and supervisor, unsupervised: {watch():.1f} s")
    assert swept.all_is_well, swept.problems
    assert (swept.jobs_removed, swept.clusters_stopped) == (1, [lost.cluster])
    assert (swept.flow_runs_ended, swept.task_runs_ended) == (1, 2)
    assert jobs_of(queue, lost.cluster) == [] and lost.cluster not in gateway_clusters(condor_environment)
    ended = api.read_flow_run(uuid.UUID(lost.flow_run_id)).state
    assert ended is not None and ended.is_crashed() and "process of this flow run is gone" in str(ended.message)
    assert unfinished(api, lost.flow_run_id) == []
    assert not sweep(load_settings()).found


@pytest.mark.pool
@pytest.mark.timeout(240)
def test_sweep_ends_task_runs_when_the_lease_has_taken_the_rest(
    processes: list[PlainFlow],
    queue: ScheddClient,
    condor_environment: EmbeddedEndpoint,
    api: SyncPrefectClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for lease in ("DURATION", "SCHEDULER"):
        monkeypatch.setenv(f"PREFECT_INTEGRATIONS_HTCDASK_LEASE_{lease}", "8 s")
    lost = PlainFlow(tmp_path, "lost")
    processes.append(lost)
    lost.wait_until_it_computes()
    wait_until(lambda: len(unfinished(api, lost.flow_run_id)) == 2, 20, "two task runs are unfinished in the API")
    lost.kill_all()
    wait_until(lambda: jobs_of(queue, lost.cluster) == [], 100, "the lease has ended the jobs")
    # Nobody has told Prefect: that its process is gone stands in the record of its cluster.
    wait_until(lambda: sweep(load_settings()).task_runs_ended == 2, 60, "the task runs are ended", pause=2)
    assert unfinished(api, lost.flow_run_id) == []
    flow_run = api.read_flow_run(uuid.UUID(lost.flow_run_id))
    assert flow_run.state is not None
    assert flow_run.state.is_crashed()
    assert sweep(load_settings()).task_runs_ended == 0
