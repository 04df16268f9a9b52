"""The runner on the real thing: a gateway cluster and HTCondor jobs per flow run, and nothing of them afterwards."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect import flow, get_client, get_run_logger, task
from prefect.runtime import flow_run as flow_run_runtime

from prefect_htcdask import HTCDaskError, HTCDaskTaskRunner, HTCGateway, get_dask_client
from prefect_htcdask.runner import flow_run
from prefect_htcdask.settings import load_settings
from tests.support.plain_flow import unfinished
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.pool, pytest.mark.usefixtures("htcdask_environment", "prefect_api")]

SMALL = {"memory": "300 MiB", "disk": "100 MiB"}


@task
def double(x: int) -> int:
    return 2 * x


@task
def job_of_this_worker() -> str | None:
    ad = os.environ.get("_CONDOR_JOB_AD")
    return Path(ad).read_text() if ad else None


@task
def touch_and_sleep(path: Path, seconds: float) -> None:
    path.touch()
    time.sleep(seconds)


@task
def work_in_children(path: Path, seconds: float) -> int:
    """Forks 12 children, which share all that this process has but for little."""
    with path.open("a") as file:
        file.write("begun\n")
    with multiprocessing.get_context("fork").Pool(12) as pool:
        pool.map(time.sleep, [seconds] * 12)
        return sum(psutil.Process(child.pid).memory_info().rss for child in multiprocessing.active_children())


def _runner(maximum: int = 2, **more: Any) -> HTCDaskTaskRunner:
    return HTCDaskTaskRunner(worker=SMALL, adapt_kwargs={"minimum": 0, "maximum": maximum}, **more)


def _left() -> tuple[list[Any], list[str]]:
    """Jobs in the queue in any state, and clusters of the gateway."""
    from prefect_htcdask.gateway.endpoints import resolve_endpoints
    from prefect_htcdask.supervisor import oneshot

    jobs: list[Any] = oneshot.call(
        resolve_endpoints(load_settings()).schedd, "query", "true", ["ClusterId", "JobStatus"]
    )
    with HTCGateway() as gateway:
        return jobs, [report.name for report in gateway.list_clusters()]


def _until_nothing_is_left(timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while (left := _left()) != ([], []):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def test_a_task_that_forks_is_not_ended_for_memory_that_it_shares(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)

    @flow(task_runner=_runner(maximum=1))
    def forking() -> int:
        return work_in_children.submit(tmp_path / "begun", 4.0).result()

    assert forking() > 2 * 300 * 2**20
    assert (tmp_path / "begun").read_text() == "begun\n"


def test_a_flow_run_has_jobs_of_its_own() -> None:
    @flow(task_runner=_runner())
    def computing() -> Any:
        results = double.map(range(50)).result()
        ad = job_of_this_worker.submit().result()
        get_run_logger().info("done")
        return results, ad, flow_run_runtime.id

    results, ad, flow_run_id = computing()
    assert results == [2 * x for x in range(50)]
    assert ad is not None
    assert f'PrefectFlowRunId = "{flow_run_id}"' in ad
    assert 'PrefectFlowName = "computing"' in ad
    assert "HTCDaskAttempt = 1" in ad
    _until_nothing_is_left()


def test_dask_clients_reach_the_scheduler_behind_the_gateway() -> None:
    @task
    def summing() -> int:
        with get_dask_client() as client:
            return sum(client.gather(client.map(abs, [-1, -2])))

    @task
    def nested() -> int:
        return sum(double.map([1, 2, 3]).result())

    @flow(task_runner=_runner())
    def computing() -> Any:
        with get_dask_client() as client:
            return client.submit(abs, -3).result(), summing.submit().result(), nested.submit().result()

    assert computing() == (3, 3, 12)
    _until_nothing_is_left()


def test_a_flow_retry_has_a_cluster_of_its_own(tmp_path: Path) -> None:
    @flow(task_runner=_runner(), retries=1)
    def computing() -> Any:
        ad = job_of_this_worker.submit().result()
        if not (tmp_path / "tried").exists():
            (tmp_path / "tried").write_text(ad)
            raise ValueError("again")
        return ad

    second = computing()
    assert "HTCDaskAttempt = 1" in (tmp_path / "tried").read_text()
    assert "HTCDaskAttempt = 2" in second
    _until_nothing_is_left()


def test_a_subflow_has_a_cluster_of_its_own() -> None:
    @flow(task_runner=_runner(1))
    def child(x: Any) -> Any:
        return double.submit(x).result(), flow_run.find(str(flow_run_runtime.id)).cluster.name

    @flow(task_runner=_runner(1))
    def parent() -> Any:
        future = double.submit(1)
        return child(future), flow_run.find(str(flow_run_runtime.id)).cluster.name

    (value, childs), own = parent()
    assert value == 4
    assert childs != own
    _until_nothing_is_left()


def test_nothing_is_provisioned_without_a_submit() -> None:
    before = _left()

    @flow(task_runner=_runner())
    def computing() -> Any:
        assert _left() == before
        return flow_run.find(str(flow_run_runtime.id))

    assert computing() is None


@pytest.mark.parametrize("error", [ValueError("wrong"), SystemExit(3), KeyboardInterrupt()])
def test_the_cluster_closes_however_the_flow_ends(error: BaseException, tmp_path: Path) -> None:
    @flow(task_runner=_runner())
    def computing() -> None:
        touch_and_sleep.submit(tmp_path / "running", 60)
        double.map(range(20))
        _wait_for(tmp_path / "running")
        raise error

    started = time.monotonic()
    with pytest.raises(type(error)):
        computing()
    # A flow that merely fails waits for the task that runs, as Prefect's own runners do.
    assert time.monotonic() - started < (100 if isinstance(error, Exception) else 45)
    _until_nothing_is_left()


def test_an_error_while_provisioning_leaves_nothing() -> None:
    @flow(task_runner=HTCDaskTaskRunner(gateway={"address": "http://127.0.0.1:9"}, condor={"schedd": "nobody"}))
    def computing() -> None:
        double.submit(1)

    state = computing(return_state=True)
    assert state.is_failed()
    assert "127.0.0.1:9" in state.message or "gateway" in state.message
    assert _left() == ([], [])


def _wait_for(path: Path, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} was not made"
        time.sleep(0.05)


SCRIPT = """
    import sys, time
    from pathlib import Path
    from prefect import flow, task
    from prefect.runtime import flow_run
    from prefect_htcdask import HTCDaskTaskRunner

    @task
    def sleepy(path):
        Path(path).touch()
        time.sleep(120)

    @flow(task_runner=HTCDaskTaskRunner(worker={"memory": "300 MiB"}, adapt_kwargs={"maximum": 2}))
    def computing():
        print("FLOW RUN", flow_run.id, flush=True)
        Path(sys.argv[1] + ".flow").touch()
        futures = [sleepy.submit(sys.argv[1]) for _ in range(5)]
        futures[0].result()

    computing()
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["running", "provisioning"])
def test_signals_leave_nothing(signum: signal.Signals, when: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    marker = tmp_path / "marker"
    process = subprocess.Popen(
        [sys.executable, str(script), str(marker)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        if when == "running":
            _wait_for(marker)
        else:
            _wait_for(Path(f"{marker}.flow"))
            time.sleep(0.7)
        started = time.monotonic()
        process.send_signal(signum)
        out, _ = process.communicate(timeout=60)
        assert time.monotonic() - started < 40, out
        assert process.returncode != 0, out
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(10)
    _until_nothing_is_left()
    # Of this flow run alone: other tests kill flows so that their task runs stay Running until a sweep.
    (flow_run_id,) = re.findall(r"^FLOW RUN (\S+)$", out, re.MULTILINE)
    with get_client(sync_client=True) as client:
        wait_until(lambda: unfinished(client, flow_run_id) == [], 20, f"every task run's end\n{out}")


def test_an_ephemeral_server_is_handed_to_the_workers(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import json
            from prefect import flow, task, get_client
            from prefect.settings import get_current_settings
            from prefect_htcdask import HTCDaskTaskRunner

            @task
            def url():
                return str(get_current_settings().api.url)

            @flow(task_runner=HTCDaskTaskRunner(worker={"memory": "300 MiB"}, adapt_kwargs={"maximum": 1}))
            def computing():
                with get_client(sync_client=True) as client:
                    return url.submit().result(), str(client.api_url)

            print("RESULT", json.dumps(computing()))
            """
        )
    )
    environment = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"}
    # A busy machine takes longer to start the server than Prefect waits by default.
    environment.update(
        PREFECT_HOME=str(tmp_path / "home"),
        PREFECT_SERVER_ALLOW_EPHEMERAL_MODE="true",
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS="100",
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stdout + done.stderr
    on_worker, in_flow = json.loads(done.stdout.partition("RESULT")[2])
    assert on_worker.rstrip("/") == in_flow.rstrip("/")
    _until_nothing_is_left()


def test_workers_that_cannot_start_fail_the_flow() -> None:
    @flow(task_runner=HTCDaskTaskRunner(worker={**SMALL, "memory": "900 GiB", "start_timeout": "5 s"}))
    def computing() -> None:
        with pytest.raises(HTCDaskError):
            double.submit(1).result(timeout=60)
        double.submit(2).result(timeout=10)

    state = computing(return_state=True)
    assert state.is_failed()
    assert "job" in state.message
    _until_nothing_is_left()
