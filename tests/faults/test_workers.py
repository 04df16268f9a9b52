"""Workers end in every way: killed, too big, evicted, removed or held by somebody else, their scratch disk full."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import pytest

from prefect_htcdask.settings import ENV_PREFIX
from tests.faults.arena import Arena, kill
from tests.faults.flow_process import FlowProcess
from tests.faults.jobs import finish
from tests.faults.row import Row, flow_message, task_run_messages
from tests.faults.wrapped_python import small_scratch
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.pool, pytest.mark.faults]
long = pytest.mark.faults_long

NewFlow = Callable[..., FlowProcess]


def test_worker_killed(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """SIGKILL of a worker process in the midst of a task"""
    flow = new_flow().start().compute()
    since = time.time()
    kill(flow.runs("g0"))
    flow.runs("g0", 2)
    row.note = f"its task ran again after {time.time() - since:.1f} s"
    finish(arena, row, flow, again=1)


@long
def test_worker_over_its_memory_once(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """a task takes more memory than its worker has, the first time only"""
    flow = new_flow(late=[["g0", "gated"], ["h0", "hog"]]).start().compute()
    flow.runs("h0", 2)
    row.expect("worker.memory" in flow.log.read_text(), "nobody said why the worker was lost, and what to set")
    finish(arena, row, flow, again=1)


@long
def test_worker_over_its_memory_always(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """a task takes more memory than its worker has, every time: Crashed, naming job and reason"""
    flow = new_flow(late=[["h0", "hog"]], once=False, maximum=1).start()
    status = flow.wait(240)
    row.gone(arena, flow.said("ended")["time"], 20, 20)
    row.judge(arena, [flow], ["Failed", "Crashed"], again=4)
    (said,) = [text for name, text in task_run_messages(arena, flow).items() if name.startswith("hog")]
    row.note = f"exit {status}; {said[:400]}"
    row.expect(said.startswith("CRASHED") and "job" in said and "memory" in said.lower(), f"it says {said}")
    row.check()


@long
def test_job_vacated(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """condor_vacate_job of a worker's job"""
    flow = new_flow().start().compute()
    since = time.time()
    arena.condor("condor_vacate_job", flow.job_of("g0"))
    flow.runs("g0", 2)
    row.note = f"its task ran again after {time.time() - since:.1f} s"
    finish(arena, row, flow, again=1)


def test_job_removed_by_another(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """condor_rm of a worker's job by somebody else"""
    flow = new_flow().start().compute()
    job = flow.job_of("g0")
    since = time.time()
    arena.condor("condor_rm", job)
    flow.runs("g0", 2)
    row.note = f"its task ran again after {time.time() - since:.1f} s"
    row.expect(flow.job_of("g0", 2) != job, "it is the same job")
    finish(arena, row, flow, again=1)


@long
def test_all_jobs_removed_by_another(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """condor_rm -all by somebody else, twice"""
    flow = new_flow().start().compute()
    for n in (2, 3):
        arena.condor("condor_rm", "-all")
        flow.runs("g0", n)
        flow.runs("g1", n)
    finish(arena, row, flow, again=4)


@long
@pytest.mark.parametrize("release", [True, False], ids=["released", "left held"])
def test_job_held(release: bool, arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """condor_hold of a worker's job"""
    flow = new_flow().start().compute()
    job = flow.job_of("g0")
    worker = psutil.Process(flow.runs("g0"))
    arena.condor("condor_hold", job)
    if release:
        # A job released before its shadow has ended is never matched again: HTCondor 23.9 counts it as running.
        wait_until(lambda: not worker.is_running() and arena.job_ids(2) != [], 30, "the worker is gone")
        # It may be removed by now, since a held worker is replaced.
        done = arena.condor("condor_release", job, check=False)
        row.note = (done.stdout + done.stderr).strip()[:100]
    flow.runs("g0", 2)
    finish(arena, row, flow, again=1)


@long
@pytest.mark.parametrize("once", [True, False], ids=["once", "always"])
def test_scratch_disk_full(once: bool, arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """a task fills the scratch disk of its job, a file system of 48 MB; it has one retry"""
    python, reason = small_scratch(arena.directory, megabytes=48)
    if reason:
        pytest.skip(reason)
    flow = new_flow(
        {f"{ENV_PREFIX}WORKER_PYTHON": str(python)},
        late=[["g0", "gated"], ["f0", "fill"]],
        task_retries=1,
        once=once,
        fill_mib=200,
    )
    flow.start().runs("f0", 2)
    if once:
        # Prefect's own retry runs in the same task run, and is no second execution that Dask had to make.
        finish(arena, row, flow, again=1)
        return
    flow.let_go()
    status = flow.wait(120)
    row.gone(arena, flow.said("ended")["time"], 20, 20)
    row.judge(arena, [flow], ["Failed"], again=1)
    row.note = f"exit {status}; {flow_message(arena, flow)[:200]}"
    row.expect("No space left" in flow_message(arena, flow), f"the flow says {flow_message(arena, flow)}")
    row.check()


@long
def test_guard_killed(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """SIGKILL of the job's first process, and with it its worker"""
    flow = new_flow().start().compute()
    worker = psutil.Process(flow.runs("g0"))
    guard = worker.parent()
    assert guard is not None
    kill(guard)
    flow.runs("g0", 2)
    wait_until(lambda: not worker.is_running(), 20, "the worker without a guard is gone")
    finish(arena, row, flow, again=1)
