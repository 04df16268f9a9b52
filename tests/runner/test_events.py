"""Prefect events of a flow run on HTCondor workers, at a real server, and the example automations that act on them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import htcondor2
import pytest
from prefect import flow, task
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
from prefect.runtime import flow_run as flow_run_runtime
from prefect.states import Crashed

from prefect_htcdask import HTCDaskTaskRunner
from prefect_htcdask.condor.schedd import ScheddClient
from prefect_htcdask.embedded import EmbeddedEndpoint
from tests.support.cluster_fixtures import SMALL, jobs_of
from tests.support.prefect_command import CHECKOUT, prefect
from tests.support.prefect_events import events_of, names_of
from tests.support.prefect_fixtures import PrefectServer
from tests.support.waiting import wait_until


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[str]]]:
    """The address of a web server, and what was posted to it."""
    posted: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            """Not on stderr."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", posted
        server.shutdown()
        thread.join()


@pytest.mark.timeout(300)
def test_held_workers_notify_and_a_crash_sweeps(
    own_prefect_server: PrefectServer,
    condor_environment: EmbeddedEndpoint,
    queue: ScheddClient,
    webhook: tuple[str, list[str]],
) -> None:
    address, posted = webhook
    block = CustomWebhookNotificationBlock(
        name="htcdask-test", url=address, json_data={"subject": "{{subject}}", "body": "{{body}}"}
    )
    block.save("htcdask-test", overwrite=True)
    prefect("work-pool", "create", "htcdask", "--type", "process", "--overwrite")
    prefect("deploy", "--prefect-file", "deployments/prefect.yaml", "--name", "leftovers")
    script = [sys.executable, "deployments/automations.py", "--notify", "custom-webhook/htcdask-test"]
    for _ in range(2):
        made = subprocess.run(script, cwd=CHECKOUT, capture_output=True, text=True, timeout=120)
        assert made.returncode == 0, made.stderr
    with get_client(sync_client=True) as client:
        names = [automation.name for automation in client.read_automations()]
        assert sorted(names) == sorted(made.stdout.splitlines()), "a second call replaces the first one's"

    @task
    def work(number: int) -> int:
        return number + 1

    @flow(task_runner=HTCDaskTaskRunner(cluster_kwargs=SMALL, adapt_kwargs={"maximum": 2}))
    def analysis() -> tuple[str, str]:
        future = work.submit(1)
        job = wait_until(lambda: jobs_of(queue), 60, "a worker job")[0]
        assert queue.locate().act(htcondor2.JobAction.Hold, [job], ("by the test", 0))["TotalSuccess"] == 1
        flow_run_id = str(flow_run_runtime.id)
        wait_until(lambda: "htcdask.job.held" in names_of(flow_run_id), 60, "the event")
        assert future.result() == 2
        return flow_run_id, str(flow_run_runtime.name)

    flow_run_id, name = analysis()
    expected = {f"htcdask.cluster.{what}" for what in ("created", "scaled", "closed")} | {
        f"htcdask.job.{what}" for what in ("started", "held", "removed")
    }
    wait_until(lambda: expected <= names_of(flow_run_id), 60, "all events")
    (held,) = [event for event in events_of(flow_run_id) if event["event"] == "htcdask.job.held"]
    assert held["resource"]["htcdask.category"] == held["payload"]["category"] == "held_by_user"
    assert held["payload"]["count"] == 1 and "by the test" in held["payload"]["summary"]
    (closed,) = [event for event in events_of(flow_run_id) if event["event"] == "htcdask.cluster.closed"]
    assert closed["payload"]["held"] == 1 and "job_ids" not in closed["payload"]
    told = json.loads(wait_until(lambda: posted, 60, "the notification")[0])
    assert told["subject"] == f"HTCondor holds workers of {name}"
    assert "held_by_user" in told["body"] and "by the test" in told["body"] and flow_run_id in told["body"]

    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("sweep-leftovers/leftovers")
        wanted = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment.id]))

        def swept() -> list[Any]:
            runs = client.read_flow_runs(flow_run_filter=wanted)
            return [run for run in runs if not run.auto_scheduled]

        assert swept() == []
        crashed = client.create_flow_run(flow(lambda: None, name="crashes"))
        client.set_flow_run_state(crashed.id, Crashed(), force=True)
        (run,) = wait_until(swept, 60, "a run of the sweep")
        # Its own crash starts no other.
        client.set_flow_run_state(run.id, Crashed(), force=True)
        crashed = client.create_flow_run(flow(lambda: None, name="crashes"))
        client.set_flow_run_state(crashed.id, Crashed(), force=True)
        wait_until(lambda: len(swept()) > 1, 60, "another run of the sweep")
        assert len(swept()) == 2


FLOW = """
import os, signal, sys
from prefect import flow, task
from prefect.runtime import flow_run
from prefect_htcdask import HTCDaskTaskRunner

@task
def work():
    return 1

@flow(task_runner=HTCDaskTaskRunner(cluster_kwargs={"memory": "300 MiB", "disk": "100 MiB"}))
def killed():
    work.submit().result()
    print(flow_run.id, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

killed()
"""


@pytest.mark.timeout(240)
def test_the_supervisor_tells_of_the_cleanup_after_a_killed_flow(
    prefect_api: PrefectServer, condor_environment: EmbeddedEndpoint, queue: ScheddClient, tmp_path: Path
) -> None:
    script = tmp_path / "killed.py"
    script.write_text(FLOW)
    done = subprocess.run([sys.executable, script], env=os.environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    flow_run_id = done.stdout.split()[-1]
    wait_until(lambda: "htcdask.cleanup.succeeded" in names_of(flow_run_id), 90, "the event of the cleanup")
    (event,) = [one for one in events_of(flow_run_id) if one["event"].startswith("htcdask.cleanup.")]
    assert event["resource"]["prefect.resource.id"] == f"htcdask.flow-run.{flow_run_id}"
    assert event["payload"]["by"] == "supervisor" and event["payload"]["jobs"] >= 1
    assert event["payload"]["problems"] == [] and len(event["payload"]["clusters"]) == 1
    assert jobs_of(queue) == []
