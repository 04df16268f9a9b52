"""Why jobs do not run, asked of the real pool, and told by ``prefect-htcdask jobs``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import htcondor2
import pytest
from typer.testing import CliRunner

from prefect_htcdask.cli import app
from prefect_htcdask.cli import jobs as cli_flow_runs
from prefect_htcdask.condor.analyze import IdleJobs
from prefect_htcdask.condor.diagnosis import Category
from prefect_htcdask.condor.schedd import ScheddClient
from prefect_htcdask.condor.submit_description import FlowRunTag
from prefect_htcdask.gateway import HTCGatewayCluster
from tests.support.cluster_fixtures import jobs_named, jobs_of, texts
from tests.support.command_line import run
from tests.support.waiting import wait_until

NewCluster = Callable[..., HTCGatewayCluster]
NEVER = {"memory": "640 GiB"}


def listed(*options: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and answer of ``jobs --json``."""
    done = run("jobs", "--json", *options)
    return done.returncode, json.loads(done.stdout)


def test_a_worker_that_no_slot_can_take(new_cluster: NewCluster, queue: ScheddClient) -> None:
    with new_cluster(n_workers=2, **NEVER) as cluster:
        wait_until(lambda: len(jobs_of(queue, cluster.name)) == 2, 20, "the jobs")
        found = IdleJobs(queue).explain(jobs_named(cluster.name), 2)
        assert found is not None and found.category is Category.NO_SLOT_LARGE_ENOUGH
        assert found.summary.startswith(
            "2 worker jobs wait: 0 of 1 slots have 640 GiB of memory (the most that one has"
        )
        assert found.remedy == "lower worker.memory"
        status, jobs = listed()
        assert status == 1
        assert {(job["state"], job["category"], job["summary"], job["remedy"]) for job in jobs} == {
            ("idle", "no_slot_large_enough", found.summary, "lower worker.memory")
        }
        shown = run("jobs").stdout
        assert (
            "no_slot_large_enough" in shown and "0 of 1 slots have 640 GiB" in shown and "lower worker.memory" in shown
        )


def test_a_kind_of_worker_that_no_slot_can_take(new_cluster: NewCluster, queue: ScheddClient) -> None:
    with new_cluster(workers={"cpu": {}, "fat": NEVER}) as cluster:
        cluster.scale(1, group="cpu")
        cluster.scale(1, group="fat")
        wait_until(lambda: [job["state"] for job in listed()[1]] == ["running", "idle"], 60, "one that runs")
        status, jobs = listed()
        assert [(job["group"], job["remedy"]) for job in jobs] == [("cpu", ""), ("fat", "lower workers.fat.memory")]
        assert status == 1


def test_what_the_pool_knows_of_its_users(new_cluster: NewCluster, queue: ScheddClient) -> None:
    with new_cluster(n_workers=1) as cluster, cluster.get_client() as client:
        client.wait_for_workers(1, timeout=60)
        (user,) = {str(ad["User"]) for ad in queue.query(jobs_named(cluster.name), ["User"])}
        wait_until(lambda: [one for one in queue.accounting(user) if one.get("ResourcesUsed")], 60, "the usage")
        (own,) = [one for one in queue.accounting(user) if one["Name"] == user]
        assert own["Priority"] > 0
        assert listed() == (0, [job for job in listed()[1] if job["state"] == "running" and job["category"] == ""])


@pytest.mark.timeout(120)
def test_the_wait_is_explained_long_before_the_flow_gives_up(
    new_cluster: NewCluster, messages: list[dict[str, Any]]
) -> None:
    cluster = new_cluster(n_workers=1, start_timeout="10 m", **NEVER)
    (told,) = wait_until(
        lambda: [message for message in messages if message["kind"] == "waiting"], 90, "a word on why nothing starts"
    )
    assert (told["level"], told["category"]) == ("warning", "no_slot_large_enough")
    assert "0 of 1 slots have 640 GiB of memory" in told["text"] and "lower worker.memory" in told["text"]
    assert texts(messages, "failed") == ""
    cluster.close()


def test_a_held_job(new_cluster: NewCluster, queue: ScheddClient, messages: list[dict[str, Any]]) -> None:
    with new_cluster(n_workers=1, **NEVER) as cluster:
        (job,) = wait_until(lambda: jobs_of(queue, cluster.name), 20, "a job")
        queue.locate().act(htcondor2.JobAction.Hold, [job], ("by the test", 0))
        wait_until(lambda: "held" in texts(messages, "log"), 20, "the hold in the log")
        (told,) = [message for message in messages if message["kind"] == "job" and message["what"] == "held"]
        assert told["category"] == "held_by_user" and told["hold_reason"].startswith("by the test")
        status, jobs = listed()
        (held,) = [one for one in jobs if one["job_id"] == job]
        assert (status, held["state"], held["category"]) == (1, "held", "held_by_user")
        assert "by the test" in held["summary"] and "condor_release" in held["remedy"]


def test_workers_that_died_are_told_of_when_the_flow_run_is_over(
    new_cluster: NewCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag = FlowRunTag(id="6d6b1f5e-0000-4000-8000-000000000001", name="brave-worker", flow_name="f")
    cluster = new_cluster(n_workers=1, python="/no/such/python", flow_run=tag)
    status, jobs = wait_until(lambda: (told := listed("--flow-run", tag.id))[1] and told, 60, "a failed worker")
    cluster.close()
    status, jobs = listed("--flow-run", tag.id)
    assert status == 1 and {job["state"] for job in jobs} == {"failed"}
    assert {job["category"] for job in jobs} == {"python_missing"}
    assert "/no/such/python" in jobs[0]["summary"] and "worker.python" in jobs[0]["remedy"]
    assert jobs[0]["batch_name"] == "brave-worker" and jobs[0]["host"]
    assert listed() == (0, []), "what is over is told to who asks for it"
    # Nor does it take a pool that still runs: the personal one stops when nobody uses it.
    monkeypatch.setattr(cli_flow_runs, "resolve_running_endpoints", lambda settings: None)
    answer = CliRunner().invoke(app, ["jobs", "--json", "--flow-run", tag.id])
    assert (answer.exit_code, json.loads(answer.stdout)) == (1, jobs)
