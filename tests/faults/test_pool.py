"""HTCondor's own daemons go: the schedd, before and while a flow runs, and the collector."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest

from prefect_htcdask.settings import ENV_PREFIX
from tests.faults.arena import Arena, Unknown, kill
from tests.faults.flow_process import FlowProcess
from tests.faults.row import Row, flow_message
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.pool, pytest.mark.faults]
long = pytest.mark.faults_long

NewFlow = Callable[..., FlowProcess]
DOWN = 20.0
"""Seconds that a daemon is away."""


def finish(arena: Arena, row: Row, flow: FlowProcess, again: int, jobs_within: float = 30) -> None:
    """Let the flow end well, and measure."""
    flow.let_go()
    row.expect(flow.wait(150) == 0, f"the flow failed: {flow_message(arena, flow)}")
    row.gone(arena, flow.said("ended")["time"], jobs_within, 30)
    row.judge(arena, [flow], ["Completed"], again=again)
    row.check()


def answers(arena: Arena) -> bool:
    """Whether the schedd does."""
    try:
        arena.job_ids()
    except Unknown:
        return False
    return True


@long
def test_schedd_killed(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """SIGKILL of the schedd mid-flow; its master starts it again"""
    flow = new_flow().start().compute()
    lost = arena.daemon("condor_schedd")
    kill(lost)
    wait_until(lambda: not lost.is_running() and answers(arena), 60, "the schedd is back")
    finish(arena, row, flow, again=2)


def test_schedd_restarted(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """condor_restart of the schedd mid-flow"""
    flow = new_flow().start().compute()
    lost = arena.daemon("condor_schedd")
    arena.condor("condor_restart", "-daemon", "schedd", "-fast")
    wait_until(lambda: not lost.is_running() and answers(arena), 60, "the schedd is back")
    finish(arena, row, flow, again=2)


@long
def test_schedd_down_at_submit(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """schedd down when workers are to be submitted, and back after 20 s"""
    flow = new_flow({f"{ENV_PREFIX}ADAPTIVE_RESIDENCE": "1 s"}, pause=True).start()
    flow.told("collected")
    wait_until(lambda: not arena.job_ids(), 60, "the workers of the first tasks have left")
    with arena.without("schedd"):
        flow.say("second")
        time.sleep(DOWN)  # the fault itself
        row.expect(not flow.runs_of("g0"), "a worker came without a schedd")
    since = time.time()
    flow.compute()
    row.note = f"tasks ran {time.time() - since:.1f} s after the schedd was back"
    finish(arena, row, flow, again=0)


@long
def test_schedd_down_at_start(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """schedd down when the flow starts, and back after 20 s: it waits, or fails with a clear reason at once"""
    flow = new_flow()
    with arena.without("schedd"):
        flow.start().told("began")
        time.sleep(DOWN)  # the fault itself
    flow.let_go()
    status = flow.wait(150)
    message = flow_message(arena, flow)
    row.note = f"exit {status}; {message[:300]}"
    row.expect(status == 0 or "schedd" in message, f"the reason is not clear: {message}")
    row.gone(arena, flow.said("ended")["time"], 20, 20)
    row.judge(arena, [flow], ["Completed", "Failed"], again=0)
    row.check()


@long
def test_schedd_down_at_the_end(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """schedd down when the flow ends, and back after 20 s: its jobs go then"""
    flow = new_flow().start().compute()
    with arena.without("schedd"):
        flow.let_go()
        status = flow.wait(120)
        ended = time.time() - flow.said("ended")["time"]
        row.note = f"the process ended {ended:.1f} s after the flow"
        row.expect(status == 0, f"the flow failed: {flow.tail(5)}")
        time.sleep(max(0.0, DOWN - ended))
    row.gone(arena, time.time(), 60, 30)
    row.judge(arena, [flow], ["Completed"], again=0)
    row.check()


@long
def test_schedd_hangs(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """schedd stopped for 20 s mid-flow, taking connections and answering none"""
    flow = new_flow().start().compute()
    schedd = arena.daemon("condor_schedd")
    kill(schedd, number=signal.SIGSTOP)
    try:
        time.sleep(DOWN)  # the fault itself
    finally:
        kill(schedd, number=signal.SIGCONT)
    finish(arena, row, flow, again=0)


@long
def test_collector_down(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """collector down for 20 s mid-flow, when further workers are wanted"""
    flow = new_flow({f"{ENV_PREFIX}ADAPTIVE_RESIDENCE": "1 s"}, pause=True).start()
    flow.told("collected")
    wait_until(lambda: not arena.job_ids(), 60, "the workers of the first tasks have left")
    with arena.without("collector"):
        flow.say("second")
        time.sleep(DOWN)  # the fault itself
    since = time.time()
    flow.compute()
    row.note = f"tasks ran {time.time() - since:.1f} s after the collector was back"
    finish(arena, row, flow, again=0)


@long
def test_startd_killed(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """SIGKILL of the startd: the execute host's end, as HTCondor sees it"""
    flow = new_flow().start().compute()
    kill(arena.daemon("condor_startd"))
    flow.runs("g0", 2, timeout=150)
    flow.runs("g1", 2, timeout=60)
    # The lost jobs are given twice their vacate time of 20 s.
    finish(arena, row, flow, again=2, jobs_within=70)
