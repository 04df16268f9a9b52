"""The flow hooks: with each end of real flows, twice, at once, for retries, and where parts are down."""

from __future__ import annotations

import asyncio
import contextvars
import json
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect import Flow, State, flow, task
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.flows import load_flow_from_entrypoint
from prefect.states import AwaitingRetry, Cancelling, Completed, Crashed, Failed, Pending, Running

from prefect_htcdask import HTCDaskTaskRunner, remove_leftover_jobs, with_cleanup
from prefect_htcdask.cleanup.remove import _last_attempt
from prefect_htcdask.condor.schedd import ScheddClient
from prefect_htcdask.condor.submit_description import FlowRunTag
from prefect_htcdask.embedded import EmbeddedEndpoint
from prefect_htcdask.gateway import HTCGatewayCluster
from prefect_htcdask.gateway.run_directory import record_cluster
from tests.support.cluster_fixtures import SMALL, gateway_clusters, jobs_of
from tests.support.prefect_events import events_of, names_of
from tests.support.prefect_fixtures import PrefectServer
from tests.support.waiting import wait_until

CLEANUPS = {"htcdask.cleanup.succeeded", "htcdask.cleanup.failed"}
HOOKS = ("on_completion_hooks", "on_failure_hooks", "on_cancellation_hooks", "on_crashed_hooks")


def own_hook(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """A hook of the user's."""


def test_all_ends_get_the_hook_and_own_hooks_stay() -> None:
    mine = [own_hook]

    @with_cleanup
    @flow(on_failure=mine, on_crashed=mine)
    def analysis(x: int) -> int:
        return x

    assert isinstance(analysis, Flow)
    assert analysis.on_failure_hooks == analysis.on_crashed_hooks == [own_hook, remove_leftover_jobs]
    assert analysis.on_completion_hooks == analysis.on_cancellation_hooks == [remove_leftover_jobs]
    assert mine == [own_hook], "the user's list is the user's"
    assert with_cleanup(analysis) is analysis
    assert [len(getattr(analysis, name)) for name in HOOKS] == [1, 2, 1, 2]
    again = analysis.with_options(name="other")
    assert all(remove_leftover_jobs in getattr(again, name) for name in HOOKS)


def test_a_function_is_no_flow() -> None:
    with pytest.raises(TypeError, match=r"above @flow"):
        with_cleanup(lambda: None)  # type: ignore[type-var]


def test_hooks_are_there_when_prefect_imports_the_flow_anew(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            from prefect import flow
            from prefect_htcdask import HTCDaskTaskRunner, with_cleanup

            @with_cleanup
            @flow(task_runner=HTCDaskTaskRunner())
            def analysis(x: int = 1) -> int:
                return x
            """
        )
    )
    found = load_flow_from_entrypoint(f"{script}:analysis", use_placeholder_flow=False)
    assert all(remove_leftover_jobs.__name__ in [hook.__name__ for hook in getattr(found, name)] for name in HOOKS)


def test_the_hook_s_module_is_there_for_workers_too() -> None:
    """A flow's module is imported by workers, whose environment need not have the submit host's packages."""
    code = (
        "import sys; from prefect_htcdask import remove_leftover_jobs, with_cleanup;"
        "print(*({'dask_gateway', 'classad2', 'htcondor2', 'distributed', 'dask'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []


# Attempts, on a real Prefect server


@flow
def nothing() -> None:
    """A flow for flow runs that the tests move themselves."""


@pytest.fixture
def api(prefect_api: PrefectServer) -> Any:
    with get_client(sync_client=True) as client:
        yield client


def new_run(api: SyncPrefectClient, *states: State[Any]) -> FlowRun:
    run = api.create_flow_run(nothing)
    for state in states:
        api.set_flow_run_state(run.id, state, force=True)
    return api.read_flow_run(run.id)


@pytest.mark.parametrize(
    ("states", "last"),
    [
        ([Running(), Completed()], 1),
        ([Running(), Crashed()], 1),
        ([Running(), Cancelling()], 1),
        ([Running(), Failed(), AwaitingRetry(), Pending()], 1),
        ([Running(), Failed(), AwaitingRetry(), Running()], 1),
        ([Running(), AwaitingRetry(), Running(), Crashed()], 2),
        ([Pending(), Crashed()], 1),
        ([Running()], 0),
    ],
)
def test_which_attempts_are_over(api: SyncPrefectClient, states: list[State[Any]], last: int) -> None:
    run = new_run(api, *states)
    # Prefect's supervising process has read the flow run before it began.
    assert _last_attempt(run.model_copy(update={"run_count": 0})) == (last, True)


def test_without_an_api_the_caller_s_word_counts(api: SyncPrefectClient) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    run = new_run(api, Running(), AwaitingRetry(), Running(), Crashed())
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert _last_attempt(run) == (2, True)
    unknown = run.model_copy(update={"id": uuid.uuid4(), "run_count": 1})
    assert _last_attempt(unknown) == (1, False), "unknown to the API"


def cleanup_of(run: FlowRun, end: str) -> dict[str, Any]:
    """What the API was told of the first cleanup of a flow run, once it was."""
    told = wait_until(lambda: names_of(str(run.id)) & CLEANUPS and events_of(str(run.id)), 60, "the cleanup's event")
    (first, *_) = [event for event in told if event["event"] in CLEANUPS]
    assert first["event"] == f"htcdask.cleanup.{end}", told
    payload: dict[str, Any] = first["payload"]
    return payload


# On the real pool


def tag_of(run: FlowRun, attempt: int = 1) -> FlowRunTag:
    return FlowRunTag(str(run.id), run.name, "nothing", attempt)


@pytest.mark.pool
@pytest.mark.parametrize("state", [Completed(), Failed(), Crashed(), Cancelling()], ids=lambda state: state.name)
def test_each_end_removes_the_jobs_of_its_attempt_only(
    state: State[Any],
    new_cluster: Callable[..., HTCGatewayCluster],
    queue: ScheddClient,
    condor_environment: EmbeddedEndpoint,
    api: SyncPrefectClient,
) -> None:
    run = new_run(api, Running(), state)
    cluster = new_cluster(flow_run=tag_of(run), requirements="false")
    cluster.scale(3)
    later = new_cluster(flow_run=tag_of(run, attempt=2), requirements="false")
    later.scale(1)
    wait_until(lambda: len(jobs_of(queue)) == 4, 20, "the jobs are in the queue")
    # Twice, and at once, as Prefect's processes may.
    arguments = (remove_leftover_jobs, nothing, run, state)
    calls = [threading.Thread(target=contextvars.copy_context().run, args=arguments) for _ in range(2)]
    for call in calls:
        call.start()
    for call in calls:
        call.join(60)

    async def as_in_an_async_flow() -> None:
        remove_leftover_jobs(nothing, run, state)

    asyncio.run(as_in_an_async_flow())
    wait_until(lambda: jobs_of(queue, cluster.name) == [], 20, "no job left of the attempt that is over")
    wait_until(lambda: cluster.name not in gateway_clusters(condor_environment), 20, "its gateway cluster is stopped")
    assert len(jobs_of(queue, later.name)) == 1
    assert later.name in gateway_clusters(condor_environment)
    told = cleanup_of(run, "succeeded")
    assert told["by"] == "hook" and told["problems"] == []


@pytest.mark.pool
def test_a_job_that_names_another_flow_run_s_cluster(
    new_cluster: Callable[..., HTCGatewayCluster],
    queue: ScheddClient,
    condor_environment: EmbeddedEndpoint,
    api: SyncPrefectClient,
    tmp_path: Path,
) -> None:
    """Of our own user even: what a cluster is for, its record in our run directory says."""
    over, running = new_run(api, Running(), Crashed()), new_run(api, Running())
    cluster = new_cluster(flow_run=tag_of(running), requirements="false")
    cluster.scale(1)
    (job,) = wait_until(lambda: jobs_of(queue, cluster.name), 20, "the job is in the queue")
    (ad,) = queue.query(f"ClusterId == {job.split('.')[0]}", ["HTCDaskClusterName"])
    attributes = {
        "My.HTCDaskClusterName": json.dumps(ad["HTCDaskClusterName"]),
        "My.PrefectFlowRunId": json.dumps(str(over.id)),
        "My.HTCDaskAttempt": "1",
    }
    description = {"executable": "/bin/true", "hold": "true", "initialdir": str(tmp_path), **attributes}
    (wrong,) = queue.submit(description, 1)
    remove_leftover_jobs(nothing, over, Crashed())
    wait_until(lambda: wrong not in jobs_of(queue), 20, "the job of the flow run that is over is removed")
    assert cluster.name in gateway_clusters(condor_environment), "the cluster of the one that runs is not stopped"
    assert jobs_of(queue, cluster.name) == [job]


@pytest.mark.pool
def test_a_gateway_cluster_without_a_job_is_stopped_too(
    new_cluster: Callable[..., HTCGatewayCluster], condor_environment: EmbeddedEndpoint, api: SyncPrefectClient
) -> None:
    run = new_run(api, Running(), Crashed())
    cluster, other = new_cluster(flow_run=tag_of(run)), new_cluster()
    record_cluster(cluster.run_directory, tag_of(run), lease=180.0)
    remove_leftover_jobs(nothing, run, Crashed())
    wait_until(lambda: cluster.name not in gateway_clusters(condor_environment), 20, "the gateway cluster is stopped")
    assert other.name in gateway_clusters(condor_environment)


def test_nothing_to_do_where_the_embedded_pool_is_down(
    api: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_HTCDASK_EMBEDDED_DIRECTORY", str(tmp_path / "none"))
    monkeypatch.setenv("PREFECT_INTEGRATIONS_HTCDASK_EMBEDDED_USE_CONFIGURED_POOL", "false")
    remove_leftover_jobs(nothing, new_run(api, Running(), Crashed()), Crashed())
    assert not (tmp_path / "none").exists(), "nothing was started"
    assert [message for message in caplog.messages if "Could not remove" in message] == []


def test_schedd_and_gateway_down_are_one_clear_error(
    api: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = tmp_path / "condor_config"
    config.write_text("CONDOR_HOST = 127.0.0.1\nCOLLECTOR_HOST = 127.0.0.1:9\nSCHEDD_HOST = 127.0.0.1\n")
    prefix = "PREFECT_INTEGRATIONS_HTCDASK"
    monkeypatch.setenv(f"{prefix}_CONDOR_CONFIG_FILE", str(config))
    monkeypatch.setenv(f"{prefix}_GATEWAY_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv(f"{prefix}_CONDOR_DIRECTORY", str(tmp_path / "runs"))
    run = new_run(api, Running(), Crashed())
    record_cluster(tmp_path / "runs" / "a", tag_of(run), lease=180.0)
    started = time.monotonic()
    remove_leftover_jobs(nothing, run, Crashed())
    print(f"schedd and gateway down: the hook took {time.monotonic() - started:.1f} s")
    (error,) = [record for record in caplog.records if "Could not remove" in record.getMessage()]
    text = error.getMessage()
    assert error.levelname == "ERROR" and error.exc_info is None
    assert "condor.schedd" in text or "condor.config_file" in text or "condor.collector" in text, text
    assert "gateway.address" in text and "lease" in text and "sweep" in text
    assert api.read_flow_run(run.id).state_name == "Crashed"
    problems = cleanup_of(run, "failed")["problems"]
    assert problems and all(problem in text for problem in problems)


@task
def slow(path: Path, seconds: float) -> str:
    path.touch()
    time.sleep(seconds)
    return "done"


def states_of(api: SyncPrefectClient, run_id: uuid.UUID) -> dict[str, str]:
    runs = api.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id])))
    return {run.name: str(run.state_name) for run in runs}


@pytest.mark.pool
@pytest.mark.parametrize("fails", [False, True], ids=["on_completion", "on_failure"])
def test_a_flow_s_own_end_leaves_its_last_task_runs_to_finish(
    fails: bool, condor_environment: EmbeddedEndpoint, queue: ScheddClient, api: SyncPrefectClient, tmp_path: Path
) -> None:
    """Prefect calls the hooks while the task runner still waits for what nobody awaited."""
    started = tmp_path / "started"

    @with_cleanup
    @flow(task_runner=HTCDaskTaskRunner(worker=SMALL, adapt_kwargs={"minimum": 1, "maximum": 1}))
    def leaving() -> str:
        slow.submit(started, 4)
        wait_until(started.exists, 60, "the task runs")
        if fails:
            raise ValueError("wrong")
        return "left"

    state = leaving(return_state=True)
    run_id = state.state_details.flow_run_id
    assert run_id is not None
    assert state.is_failed() if fails else state.is_completed()
    wait_until(lambda: set(states_of(api, run_id).values()) == {"Completed"}, 20, "the task run completed")
    wait_until(lambda: jobs_of(queue) == [], 20, "no job left")
