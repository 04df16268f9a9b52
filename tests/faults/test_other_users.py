"""Another user of the pool means harm: what they write into a job's ad neither ends workers nor stops clusters."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefect_htcdask.embedded import ensure_running
from prefect_htcdask.settings import ENV_PREFIX
from tests.faults.arena import Arena
from tests.faults.conftest import _arena_key
from tests.faults.flow_process import FlowProcess
from tests.faults.row import Row, flow_message
from tests.support.pool_users import SharedPool, shared_pool
from tests.support.prefect_fixtures import PrefectServer
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.pool, pytest.mark.faults]

NewFlow = Callable[..., FlowProcess]

LEASE = 30
"""Seconds: it is renewed at a third of it."""


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedPool]:
    with shared_pool(tmp_path_factory.mktemp("users")) as made:
        yield made


@pytest.fixture
def arena(
    users: SharedPool,
    prefect_server: PrefectServer,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Arena]:
    """The arena of a pool with several users; flows are Anne's, who is no super user of the queue."""
    for name, value in users.anne.environment.items():
        monkeypatch.setenv(name, value)
    made = Arena(users.settings, ensure_running(users.settings), prefect_server, tmp_path)
    request.node.stash[_arena_key] = made
    made.clear()
    yield made
    made.clear()


def ad_of_the_flow(arena: Arena) -> dict[str, object]:
    """The ad of a worker job of Anne's, as every user of the pool may read it."""
    return next(ad for ad in arena.jobs("Owner", "HTCDaskLeaseExpires") if ad["Owner"] == "anne")


def finish(arena: Arena, row: Row, users: SharedPool, flow: FlowProcess, theirs: str) -> None:
    """Let the flow end well; the other user's job is there as it was, and goes by its own user's word."""
    row.expect(theirs in arena.job_ids(5), "the other user's job was removed, or released")
    flow.let_go()
    row.expect(flow.wait(150) == 0, f"the flow failed: {flow_message(arena, flow)}")
    row.expect(theirs in arena.job_ids(5), "the other user's job was removed with the flow's")
    users.mallory.condor("condor_rm", theirs)
    row.gone(arena, flow.said("ended")["time"], 30, 30)
    row.judge(arena, [flow], ["Completed"], again=0)
    row.check()


def test_job_of_another_user_with_our_cluster(arena: Arena, row: Row, users: SharedPool, new_flow: NewFlow) -> None:
    """another user submits a job that names our cluster: the lease of ours is renewed all the same"""
    flow = new_flow({f"{ENV_PREFIX}LEASE_DURATION": f"{LEASE} s"}).start().compute()
    before = ad_of_the_flow(arena)
    name = json.dumps(before["HTCDaskClusterName"])
    theirs = users.mallory.submit(arena.directory, HTCDaskClusterName=name, HTCDaskLeaseExpires="2000000000")
    since = time.time()
    wait_until(
        lambda: int(str(ad_of_the_flow(arena)["HTCDaskLeaseExpires"])) > since + LEASE,
        2 * LEASE,
        "the lease is renewed after the other job came",
    )
    row.note = f"renewed {time.time() - since:.1f} s after the other job came, with a lease of {LEASE} s"
    (other,) = [ad for ad in arena.jobs("Owner", "HTCDaskLeaseExpires") if ad["Owner"] == "mallory"]
    row.expect(other["HTCDaskLeaseExpires"] == 2000000000, "the other user's job was edited")
    finish(arena, row, users, flow, theirs)


def test_job_of_another_user_with_an_old_flow_run(arena: Arena, row: Row, users: SharedPool, new_flow: NewFlow) -> None:
    """another user's job names our cluster and a flow run that is over: neither hook nor sweep stops what runs"""
    flow = new_flow().start().compute()
    (cluster,) = arena.clusters()
    with arena.api() as api:
        known = api.get(f"/flow_runs/{flow.flow_run_id}").raise_for_status().json()
        old = api.post("/flow_runs/", json={"flow_id": known["flow_id"], "name": "old"}).raise_for_status().json()
        crashed = {"state": {"type": "CRASHED", "name": "Crashed"}, "force": True}
        api.post(f"/flow_runs/{old['id']}/set_state", json=crashed).raise_for_status()
    theirs = users.mallory.submit(
        arena.directory,
        HTCDaskClusterName=json.dumps(ad_of_the_flow(arena)["HTCDaskClusterName"]),
        PrefectFlowRunId=json.dumps(str(uuid.UUID(old["id"]))),
        HTCDaskAttempt="1",
    )
    hook = (
        "import sys, prefect_htcdask; from prefect import flow; from prefect.client.orchestration import get_client;"
        "nothing = flow(lambda: None, name='nothing');"
        "run = get_client(sync_client=True).read_flow_run(sys.argv[1]);"
        "prefect_htcdask.remove_leftover_jobs(nothing, run, run.state)"
    )
    done = subprocess.run(
        [sys.executable, "-c", hook, old["id"]], env=arena.environment, capture_output=True, text=True, timeout=120
    )
    row.expect(done.returncode == 0 and "Could not remove" not in done.stderr, f"the hook: {done.stderr[-500:]}")
    swept = arena.sweep()
    row.expect(not swept["leftovers"] and not swept["problems"], f"the sweep: {swept}")
    row.expect(arena.clusters() == [cluster], "the cluster of the flow that runs was stopped")
    finish(arena, row, users, flow, theirs)
