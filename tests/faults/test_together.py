"""Several at once: two runs of one flow, names that try to be code, and thousands of jobs at a close."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import httpx
import pytest

from prefect_htcdask.gateway import HTCGatewayCluster
from tests.faults.arena import Arena, kill, kill_at_once
from tests.faults.flow_process import FlowProcess
from tests.faults.jobs import jobs_of
from tests.faults.row import Row
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.pool, pytest.mark.faults]
long = pytest.mark.faults_long

NewFlow = Callable[..., FlowProcess]


@long
def test_two_flow_runs_at_once(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """two runs of the same flow at once; one is killed and swept, the other goes on untouched"""
    one, other = (new_flow(late=[["g0", "gated"]], maximum=1).start() for _ in range(2))
    one.compute(), other.compute()
    before = jobs_of(arena, other)
    assert len(before) == 1 and not set(before) & set(jobs_of(arena, one))
    kill(one.pid)
    wait_until(lambda: not jobs_of(arena, one), 20, "the killed one's jobs are gone")
    arena.sweep()
    row.expect(jobs_of(arena, other) == before and len(arena.clusters()) == 1, "the other's jobs or cluster are gone")
    other.let_go()
    row.expect(other.wait(60) == 0, f"the other failed: {other.tail(5)}")
    row.gone(arena, other.said("ended")["time"], 20, 20)
    row.judge(arena, [one, other], ["Crashed", "Completed"], again=0, sweep=True)
    row.expect(row.flow == "Crashed, Completed", f"they are {row.flow}")
    row.check()


# The flow's own name has no line break: with one, Prefect 3.8's server takes none of its task runs' states.
NAME = 'x" || TRUE || "\n+Owner = "nobody"\nqueue 7 \\" || true \\\\ $(Cluster) $$(Owner) $$([1+1]) \'; !=?= é'


HOOK = """
import sys, uuid
from prefect.client.orchestration import get_client
from prefect.flows import load_flow_from_entrypoint
from prefect.states import Crashed
from prefect_htcdask import remove_leftover_jobs

flow = load_flow_from_entrypoint("analysis.py:analysis", use_placeholder_flow=False)
with get_client(sync_client=True) as client:
    run = client.read_flow_run(uuid.UUID(sys.argv[1]))
remove_leftover_jobs(flow, run, Crashed())
"""


@long
def test_names_that_try_to_be_code(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """flow and flow run named with quotes, newlines, macros and ClassAd operators; a bystander beside it"""
    bystander = new_flow(late=[["g0", "gated"]], maximum=1).start()
    flow = new_flow(late=[["g0", "gated"]], maximum=1, flow=NAME.replace("\n", " "), flow_run=NAME).start()
    flow.compute(), bystander.compute()
    (job,), (other,) = jobs_of(arena, flow), jobs_of(arena, bystander)
    ads = {f"{ad['ClusterId']}.{ad['ProcId']}": ad for ad in arena.jobs("Owner", "PrefectFlowName", "JobBatchName")}
    assert set(ads) == {job, other}, "neither more nor fewer jobs than asked for"
    row.expect(ads[job]["Owner"] == ads[other]["Owner"], f"the owner is {ads[job]['Owner']}")
    for name in ("PrefectFlowName", "JobBatchName"):
        row.expect(ads[job][name].startswith('x" || TRUE || "'), f"{name} is {ads[job][name]}")
    kill_at_once([flow.supervisor, flow.pid])
    state = {"state": {"type": "CRASHED", "name": "Crashed"}, "force": True}
    httpx.post(f"{arena.server.url}/flow_runs/{flow.flow_run_id}/set_state", json=state).raise_for_status()
    hook = [sys.executable, "-c", HOOK, flow.flow_run_id]
    done = subprocess.run(hook, cwd=flow.source, env=arena.environment, capture_output=True, text=True, timeout=120)
    row.expect(done.returncode == 0 and "ERROR" not in done.stderr, done.stderr[-300:])
    wait_until(lambda: not jobs_of(arena, flow), 30, "its jobs are gone")
    arena.sweep()
    row.expect(jobs_of(arena, bystander) == [other] and len(arena.clusters()) == 1, "the bystander was hit")
    bystander.let_go()
    row.expect(bystander.wait(60) == 0, f"the bystander failed: {bystander.tail(5)}")
    row.gone(arena, bystander.said("ended")["time"], 20, 20)
    row.judge(arena, [flow, bystander], ["Crashed", "Completed"], again=0, sweep=True)
    row.check()


def test_two_thousand_idle_jobs(arena: Arena, row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """close() with 2,000 idle jobs in the queue"""
    for name, value in arena.environment.items():
        monkeypatch.setenv(name, value)
    cluster = HTCGatewayCluster(requirements="false")
    try:
        started = time.time()
        cluster.scale(2000)
        wait_until(lambda: len(arena.job_ids()) == 2000, 60, "2,000 jobs are in the queue", pause=0.5)
        submitted = time.time() - started
    finally:
        since = time.time()
        cluster.close()
    closed = time.time() - since
    row.note = f"in the queue after {submitted:.1f} s; close() took {closed:.1f} s"
    row.expect(closed < 20, f"close() took {closed:.1f} s")
    row.gone(arena, since, 20, 20)
    row.expect(cluster.summary.get("jobs") == 2000 and cluster.summary.get("left") == 0, f"{cluster.summary}")
    row.check()
