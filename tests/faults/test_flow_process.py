"""The flow's own process ends, in every way, with and without its supervisor, and is cancelled through the API."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from prefect_htcdask.settings import ENV_PREFIX
from tests.faults.arena import Arena, kill, kill_at_once
from tests.faults.flow_process import FlowProcess
from tests.faults.row import Row, flow_message
from tests.test_deployments import PREFECT, process_worker
from tests.waiting import wait_until

pytestmark = [pytest.mark.pool, pytest.mark.faults]
long = pytest.mark.faults_long

NewFlow = Callable[..., FlowProcess]
LEASE = 8.0
SCHEDULER_LEASE = 16.0
SHORT_LEASE = {
    f"{ENV_PREFIX}LEASE_DURATION": f"{LEASE:.0f} s",
    f"{ENV_PREFIX}LEASE_SCHEDULER": f"{SCHEDULER_LEASE:.0f} s",
}
LATE = 60.0  # a running job is given a minute more: its shadow hears of a renewal late


def cancel(arena: Arena, flow: FlowProcess) -> float:
    """Cancel a flow run as the UI does; returns when."""
    state = {"state": {"type": "CANCELLING", "name": "Cancelling"}, "force": False}
    answer = httpx.post(f"{arena.server.url}/flow_runs/{flow.flow_run_id}/set_state", json=state, timeout=30)
    assert answer.raise_for_status().json()["status"] == "ACCEPT", answer.text
    return time.time()


@long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_flow_signalled(number: signal.Signals, arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """signal to the flow's process"""
    flow = new_flow().start().compute()
    since = time.time()
    os.kill(flow.pid, number)
    status = flow.wait(60)
    row.note = f"exit {status} after {time.time() - since:.1f} s"
    row.gone(arena, since, 30, 30)
    row.judge(arena, [flow], ["Crashed"], again=0)
    row.expect(status != 0, "its exit status is 0")
    row.check()


def test_flow_killed(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """SIGKILL of the flow's process: its supervisor cleans up alone, the sweep tells Prefect"""
    flow = new_flow().start().compute()
    assert len(arena.job_ids()) == 2 and len(arena.clusters()) == 1
    since = time.time()
    kill(flow.pid)
    row.gone(arena, since, 20, 20)
    row.judge(arena, [flow], ["Crashed"], again=0, sweep=True)
    row.check()


@long
def test_flow_exits_hard(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """os._exit in the flow's process"""
    flow = new_flow(pause=True)
    script = flow.source / "analysis.py"
    hard = """futures = [gated.submit(name) for name, _ in ORDER["late"]]
            wait_for_word("second")
            os._exit(3)"""
    script.write_text(script.read_text().replace('wait_for_word("second")', hard))
    flow.start().compute()
    since = time.time()
    flow.say("second")
    row.expect(flow.wait(30) == 3, "it did not exit by itself")
    row.gone(arena, since, 20, 20)
    row.judge(arena, [flow], ["Crashed"], again=0, sweep=True)
    row.check()


def test_supervisor_killed(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """SIGKILL of the supervisor: the flow goes on, a new one takes over"""
    flow = new_flow().start().compute()
    lost = flow.supervisor
    kill(lost)
    wait_until(lambda: flow.supervisor.pid != lost.pid, 30, "there is a new supervisor")
    wait_until(lambda: "took over" in flow.log.read_text() or "takes over" in flow.log.read_text(), 30, "it says so")
    jobs = arena.job_ids()
    flow.let_go()
    row.expect(flow.wait(90) == 0, "the flow failed")
    row.gone(arena, flow.said("ended")["time"], 20, 20)
    row.judge(arena, [flow], ["Completed"], again=0)
    row.expect(len(jobs) == 2, f"{jobs} instead of two jobs after the takeover")
    row.check()


def test_flow_and_supervisor_killed(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """SIGKILL of flow and supervisor at once, leases of 8 s, the scheduler's of 16 s: they clean up"""
    flow = new_flow(SHORT_LEASE).start().compute()
    since = time.time()
    kill_at_once([flow.supervisor, flow.pid])
    row.gone(arena, since, SCHEDULER_LEASE + 20, SCHEDULER_LEASE + 20)
    row.judge(arena, [flow], ["Crashed"], again=0, sweep=True)
    row.check()


@long
def test_flow_supervisor_and_scheduler_killed(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """SIGKILL of flow and supervisor, the scheduler stuck too, leases of 8 s: the schedd's lease ends running jobs"""
    flow = new_flow(SHORT_LEASE).start().compute()
    scheduler = arena.scheduler_of(arena.jobs()[0]["HTCDaskClusterName"])
    kill(scheduler, number=signal.SIGSTOP)
    since = time.time()
    kill_at_once([flow.supervisor, flow.pid])
    try:
        wait_until(lambda: arena.job_ids() == [], LEASE + LATE + 30, "the schedd ends the jobs")
    finally:
        kill(scheduler, number=signal.SIGCONT)
    row.gone(arena, since, LEASE + LATE + 30, LEASE + LATE + 40)
    row.judge(arena, [flow], ["Crashed"], again=0, sweep=True)
    row.check()


def test_cancelled_by_api(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """cancel through the API, no process worker beside the flow"""
    flow = new_flow().start().compute()
    since = cancel(arena, flow)
    row.note = f"exit {flow.wait(60)} after {time.time() - since:.1f} s"
    row.gone(arena, since, 30, 30)
    row.judge(arena, [flow], ["Cancelled"], again=0)
    row.check()


@long
def test_cancelled_while_provisioning(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """cancel through the API while no worker has come yet"""
    flow = new_flow({f"{ENV_PREFIX}WORKER_REQUIREMENTS": "false"}).start()
    wait_until(arena.job_ids, 60, "jobs wait in the queue")
    since = cancel(arena, flow)
    row.note = f"exit {flow.wait(60)} after {time.time() - since:.1f} s"
    row.gone(arena, since, 30, 30)
    row.judge(arena, [flow], ["Cancelled"], again=0)
    row.check()


DEPLOYMENT = """
name: faults
pull:
  - prefect.deployments.steps.set_working_directory:
      directory: {directory}
deployments:
  - name: supervised
    entrypoint: analysis.py:analysis
    work_pool:
      name: htcdask
"""


@long
@pytest.mark.parametrize("how", ["cancelled", "killed"])
def test_under_a_process_worker(
    how: str, arena: Arena, row: Row, new_flow: NewFlow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """under a process worker: cancelled through the API, or flow and supervisor killed; Prefect's hooks clean up"""
    flow = new_flow(hooks=True)
    for name, value in arena.environment.items():
        monkeypatch.setenv(name, value)

    def prefect(*arguments: str) -> None:
        done = subprocess.run(
            [*PREFECT, *arguments], cwd=flow.source, env={**os.environ, "PWD": str(flow.source)},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    (flow.source / "prefect.yaml").write_text(DEPLOYMENT.format(directory=flow.source))
    prefect("work-pool", "create", "htcdask", "--type", "process", "--overwrite")
    prefect("deploy", "--all")
    with process_worker(flow.log):
        prefect("deployment", "run", "analysis/supervised")
        flow.compute()
        if how == "cancelled":
            since = cancel(arena, flow)
        else:
            since = time.time()
            kill_at_once([flow.supervisor, flow.pid])
        row.gone(arena, since, 60, 60)
        # After a kill nobody is left to tell of the task runs.
        row.judge(arena, [flow], ["Cancelled"] if how == "cancelled" else ["Crashed"], again=0, sweep=how == "killed")
    row.check()


@long
def test_laptop_asleep(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """pool, gateway and flow asleep on one host for longer than the lease: the clock has jumped as they awake"""
    flow = new_flow().start().compute()
    before = set(arena.job_ids())
    processes: list[Any] = [flow.supervisor, flow.pid]
    kill(*processes, number=signal.SIGSTOP)
    try:
        # A suspend stops what a scheduler counts its lease with (CLOCK_MONOTONIC), but not the clock of the jobs'.
        # A running job has a minute more.
        past = str(int(time.time()) - 120)
        arena.edit_jobs("HTCDaskLeaseExpires", past)
        wait_until(lambda: not before & set(arena.job_ids()), 60, "the schedd has removed the jobs")
    finally:
        kill(*reversed(processes), number=signal.SIGCONT)
    flow.runs("g0", 2)
    flow.runs("g1", 2)
    flow.let_go()
    row.expect(flow.wait(120) == 0, f"the flow failed: {flow_message(arena, flow)}")
    row.gone(arena, flow.said("ended")["time"], 20, 20)
    row.judge(arena, [flow], ["Completed"], again=2)
    row.check()


@long
def test_asleep_for_longer_than_the_lease(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """flow and supervisor stopped (a laptop asleep, pool and gateway elsewhere) until their lease took the workers"""
    flow = new_flow({**SHORT_LEASE, f"{ENV_PREFIX}LEASE_SCHEDULER": "10 minutes"}).start().compute()
    before = set(arena.job_ids())
    processes: list[Any] = [flow.supervisor, flow.pid]
    kill(*processes, number=signal.SIGSTOP)
    try:
        since = time.time()
        wait_until(lambda: not before & set(arena.job_ids()), LEASE + LATE + 30, "the schedd ends the jobs")
        asleep = time.time() - since
    finally:
        kill(*reversed(processes), number=signal.SIGCONT)
    awake = time.time()
    flow.runs("g0", 2)
    flow.runs("g1", 2)
    row.note = f"asleep for {asleep:.0f} s; its tasks ran again {time.time() - awake:.0f} s after it awoke"
    flow.let_go()
    row.expect(flow.wait(120) == 0, f"the flow failed: {flow_message(arena, flow)}")
    row.gone(arena, flow.said("ended")["time"], 20, 20)
    row.judge(arena, [flow], ["Completed"], again=2)
    row.check()


HOOK = """
import sys, uuid
from prefect.client.orchestration import get_client
from prefect.flows import load_flow_from_entrypoint
from prefect.states import Crashed
from prefect_htcdask import remove_leftover_jobs

flow = load_flow_from_entrypoint("analysis.py:analysis", use_placeholder_flow=False)
with get_client(sync_client=True) as client:
    run = client.read_flow_run(uuid.UUID(sys.argv[1]))
for _ in range(2):
    remove_leftover_jobs(flow, run, Crashed())
"""


@long
def test_hooks_twice_and_at_once(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """hooks of the same flow run fired twice in each of three processes at once, flow and supervisor killed"""
    flow = new_flow().start().compute()
    kill_at_once([flow.supervisor, flow.pid])
    state = {"state": {"type": "CRASHED", "name": "Crashed"}, "force": True}
    httpx.post(f"{arena.server.url}/flow_runs/{flow.flow_run_id}/set_state", json=state).raise_for_status()
    since = time.time()
    command = [sys.executable, "-c", HOOK, flow.flow_run_id]
    hooks = [
        subprocess.Popen(command, cwd=flow.source, env=arena.environment, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for hook in hooks:
        said = hook.communicate(timeout=120)[1]
        row.expect(hook.returncode == 0 and "Traceback" not in said and "ERROR" not in said, said[-300:])
    row.gone(arena, since, 60, 60)
    row.judge(arena, [flow], ["Crashed"], again=0, sweep=True)
    row.check()
