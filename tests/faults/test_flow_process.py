"""The flow's own process ends, in every way, with and without its supervisor, and is cancelled through the API."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from prefect_htcdask.settings import ENV_PREFIX
from tests.faults.arena import Arena, kill, kill_at_once
from tests.faults.flow_process import FlowProcess
from tests.faults.jobs import jobs_of
from tests.faults.leases import LATE, LEASE, SCHEDULER_LEASE, SHORT_LEASE
from tests.faults.row import Row, flow_message, task_run_messages
from tests.support.prefect_command import PREFECT, process_worker
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.pool, pytest.mark.faults]
long = pytest.mark.faults_long

NewFlow = Callable[..., FlowProcess]


def cancel(arena: Arena, flow: FlowProcess) -> float:
    """Cancel a flow run as the UI does; returns when."""
    state = {"state": {"type": "CANCELLING", "name": "Cancelling"}, "force": False}
    with arena.api() as api:
        answer = api.post(f"/flow_runs/{flow.flow_run_id}/set_state", json=state)
    assert answer.raise_for_status().json()["status"] == "ACCEPT", answer.text
    return time.time()


def report_of(arena: Arena, flow: FlowProcess) -> str:
    """The report on a flow run's page; empty where there is none."""
    order = {"artifacts": {"flow_run_id": {"any_": [flow.flow_run_id]}, "type": {"any_": ["markdown"]}}}
    with arena.api() as api:
        found = api.post("/artifacts/filter", json=order).raise_for_status().json()
    return next((one["data"] for one in found if one["key"].endswith("-htcondor-report")), "")


def ends_of(arena: Arena, flow: FlowProcess, task: str) -> list[str]:
    """Types of the states in which a task's runs are."""
    told = task_run_messages(arena, flow)
    return [message.partition(":")[0] for name, message in sorted(told.items()) if name.startswith(task)]


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
    scheduler = arena.scheduler_of(arena.clusters()[0])
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
    row.expect(ends_of(arena, flow, "gated") == ["CANCELLED"] * 2, "what ran is not Cancelled")
    row.expect(report_of(arena, flow).startswith("# "), "it has no report")
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
  - name: {name}
    entrypoint: analysis.py:analysis
    work_pool:
      name: htcdask
"""


@contextmanager
def under_a_process_worker(arena: Arena, *flows: FlowProcess) -> Iterator[Path]:
    """Have a process worker of Prefect's run flows, until all of them compute; gives the worker's log."""

    def prefect(directory: Path, *arguments: str) -> None:
        done = subprocess.run(
            [*PREFECT, *arguments], cwd=directory, env={**arena.environment, "PWD": str(directory)},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    prefect(arena.directory, "work-pool", "create", "htcdask", "--type", "process", "--overwrite")
    log = arena.directory / "process_worker.log"
    with process_worker(log, arena.environment):
        for flow in flows:
            name = flow.directory.name
            (flow.source / "prefect.yaml").write_text(DEPLOYMENT.format(directory=flow.source, name=name))
            prefect(flow.source, "deploy", "--all")
            with arena.api() as api:
                found = api.get(f"/deployments/name/analysis/{name}").raise_for_status().json()
                api.post(f"/deployments/{found['id']}/create_flow_run", json={}).raise_for_status()
        for flow in flows:
            wait_until((flow.marks / "began.json").exists, 120, f"it runs: {log.read_text()[-3000:]}")
            flow.compute()
        yield log


@long
def test_cancelled_under_a_process_worker(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """cancel through the API, under a process worker"""
    flow = new_flow(hooks=True)
    with under_a_process_worker(arena, flow):
        since = cancel(arena, flow)
        row.gone(arena, since, 60, 60)
        row.judge(arena, [flow], ["Cancelled"], again=0)
    row.expect(ends_of(arena, flow, "gated") == ["CANCELLED"] * 2, "what ran is not Cancelled")
    row.check()


def test_hooks_under_a_process_worker(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """two runs under a process worker: flow and supervisor killed, then the other cancelled, its supervisor stuck"""
    killed, cancelled = (new_flow(hooks=True, late=[["g0", "gated"]], maximum=1) for _ in range(2))
    with under_a_process_worker(arena, killed, cancelled) as log:
        (job,), (bystander,) = jobs_of(arena, killed), jobs_of(arena, cancelled)
        kill_at_once([killed.supervisor, killed.pid])
        wait_until(lambda: arena.job_ids() == [bystander], 60, f"the hook removes {job}")
        wait_until(lambda: len(arena.clusters()) == 1, 30, "the hook stops its gateway cluster")
        wait_until(lambda: "Removed 1 leftover HTCondor jobs" in log.read_text(), 20, "the hook says so")
        arena.sweep()
        row.expect(jobs_of(arena, cancelled) == [bystander] and len(arena.clusters()) == 1, "the other one was hit")
        stuck = cancelled.supervisor
        kill(stuck, number=signal.SIGSTOP)
        try:
            since = cancel(arena, cancelled)
            row.gone(arena, since, 60, 60)
        finally:
            kill(stuck)
        row.judge(arena, [killed, cancelled], ["Crashed", "Cancelled"], again=0, sweep=True)
        row.expect(row.flow == "Crashed, Cancelled", f"they are {row.flow}")
    row.expect("An error was encountered while running hook" not in log.read_text(), "a hook failed")
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
    with arena.api() as api:
        api.post(f"/flow_runs/{flow.flow_run_id}/set_state", json=state).raise_for_status()
    since = time.time()
    command = [sys.executable, "-c", HOOK, flow.flow_run_id]
    hooks = [
        subprocess.Popen(command, cwd=flow.source, env=arena.environment, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for hook in hooks:
        said = hook.communicate(timeout=600)[1]
        row.expect(hook.returncode == 0 and "Traceback" not in said and "ERROR" not in said, said[-300:])
    row.gone(arena, since, 60, 60)
    row.judge(arena, [flow], ["Crashed"], again=0, sweep=True)
    row.check()
