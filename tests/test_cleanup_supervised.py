"""The flow hooks in Prefect's own supervising process: a process worker, whose flows are killed or cancelled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import textwrap
import uuid
from pathlib import Path

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.states import Cancelling

from prefect_htcdask.condor.schedd import ScheddClient
from prefect_htcdask.embedded import EmbeddedEndpoint
from prefect_htcdask.task_run_states import UNFINISHED
from tests.cluster_fixtures import Stopwatch, gateway_clusters, jobs_of
from tests.prefect_fixtures import PrefectServer
from tests.test_cli import run
from tests.test_deployments import PREFECT, prefect, process_worker
from tests.waiting import wait_until

pytestmark = [pytest.mark.pool, pytest.mark.timeout(300)]

SCRIPT = """
    import json, os, sys, time
    from pathlib import Path
    from prefect import flow, task
    from prefect.runtime import flow_run
    from prefect_htcdask import HTCDaskTaskRunner, live, with_cleanup

    @task
    def sleepy(marker):
        Path(marker).touch()
        time.sleep(300)

    @with_cleanup
    @flow(task_runner=HTCDaskTaskRunner(worker={"memory": "300 MiB", "disk": "100 MiB"},
                                        adapt_kwargs={"minimum": 1, "maximum": 1}))
    def computing(marker: str):
        future = sleepy.submit(marker)
        while not Path(marker).exists():
            time.sleep(0.1)
        cluster = live.find(str(flow_run.id)).cluster
        Path(marker + ".part").write_text(json.dumps([os.getpid(), cluster._supervisor.pid, cluster.name]))
        os.rename(marker + ".part", marker + ".json")
        future.result()
"""

DEPLOYMENT = """
name: test
pull:
  - prefect.deployments.steps.set_working_directory:
      directory: {directory}
deployments:
  - name: supervised
    entrypoint: script.py:computing
    work_pool:
      name: htcdask
"""


@pytest.fixture
def api(prefect_api: PrefectServer) -> SyncPrefectClient:
    return get_client(sync_client=True)


def test_crash_and_cancel_under_a_process_worker(
    condor_environment: EmbeddedEndpoint, queue: ScheddClient, api: SyncPrefectClient, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    (tmp_path / "prefect.yaml").write_text(DEPLOYMENT.format(directory=tmp_path))
    prefect("work-pool", "create", "htcdask", "--type", "process", "--overwrite")
    subprocess.run(
        [*PREFECT, "deploy", "--all"],
        cwd=tmp_path,
        env={**os.environ, "PWD": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        timeout=120,
    )
    log = tmp_path / "worker.log"
    with api, process_worker(log):
        deployment = api.read_deployment_by_name("computing/supervised")
        told = {}
        ids: dict[str, uuid.UUID] = {}
        for name in ("crashed", "cancelled"):
            marker = tmp_path / name
            ids[name] = api.create_flow_run_from_deployment(deployment.id, parameters={"marker": str(marker)}).id
        for name in ids:
            wait_until((tmp_path / f"{name}.json").exists, 120, f"{name} computes; {log.read_text()[-3000:]}")
            told[name] = json.loads((tmp_path / f"{name}.json").read_text())

        pid, supervisor, cluster = told["crashed"]
        other = told["cancelled"][2]
        before = jobs_of(queue, other)
        watch = Stopwatch()
        os.kill(supervisor, signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        os.kill(supervisor, signal.SIGKILL)
        wait_until(lambda: jobs_of(queue, cluster) == [], 60, "no job is left")
        wait_until(lambda: cluster not in gateway_clusters(condor_environment), 30, "nor the gateway cluster")
        print(f"flow and supervisor killed under a process worker: all gone after {watch():.1f} s, by the hook")
        wait_until(lambda: api.read_flow_run(ids["crashed"]).state_name == "Crashed", 20, "Crashed")
        assert jobs_of(queue, other) == before, "the other flow run of the same flow is untouched"
        assert other in gateway_clusters(condor_environment)
        wait_until(lambda: "Removed 1 leftover HTCondor jobs" in log.read_text(), 20, "the hook said so")
        # The hook is for jobs; task runs are the sweep's.
        swept = run("sweep", "--json")
        assert swept.returncode == 0, swept.stderr + swept.stdout
        assert unfinished(api, ids["crashed"]) == []
        assert jobs_of(queue, other) == before

        pid, supervisor, cluster = told["cancelled"]
        os.kill(supervisor, signal.SIGSTOP)
        watch = Stopwatch()
        api.set_flow_run_state(ids["cancelled"], Cancelling(), force=True)
        wait_until(lambda: api.read_flow_run(ids["cancelled"]).state_name == "Cancelled", 120, "Cancelled")
        wait_until(lambda: jobs_of(queue, cluster) == [], 30, "no job is left")
        wait_until(lambda: cluster not in gateway_clusters(condor_environment), 30, "nor the gateway cluster")
        print(f"cancelled under a process worker, the supervisor stuck: all gone after {watch():.1f} s")
        os.kill(supervisor, signal.SIGKILL)
        wait_until(lambda: run("sweep").returncode == 0 and not unfinished(api, ids["cancelled"]), 90, "swept", pause=5)
    assert "An error was encountered while running hook" not in log.read_text()


def unfinished(api: SyncPrefectClient, flow_run_id: uuid.UUID) -> list[str]:
    runs = api.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])))
    return [str(task_run.state) for task_run in runs if task_run.state_type in UNFINISHED]
