"""Clocks of the flow's host and of the schedd's that are minutes apart."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator

import pytest

from prefect_htcdask.condor.submit_description import LEASE_REASON
from prefect_htcdask.embedded import ensure_running, stop
from prefect_htcdask.settings import EmbeddedSettings
from tests.faults.arena import Arena, kill, kill_at_once
from tests.faults.flow_process import FlowProcess
from tests.faults.leases import LATE, LEASE, SHORT_LEASE
from tests.faults.row import Row, flow_message
from tests.support.waiting import wait_until
from tools.prefect_server import PrefectServer

pytestmark = [pytest.mark.pool, pytest.mark.faults]
long = pytest.mark.faults_long

NewFlow = Callable[..., FlowProcess]
VACATE = 20.0
"""Seconds that a worker is given to leave."""
APART = 300.0
"""Seconds: more than lease and grace."""


@pytest.fixture(scope="module", params=[pytest.param(APART, id="ahead"), pytest.param(-APART, id="behind", marks=long)])
def battered_pool(
    tmp_path_factory: pytest.TempPathFactory, prefect_server: PrefectServer, request: pytest.FixtureRequest
) -> Iterator[EmbeddedSettings]:
    """A pool whose schedd and shadows have a wrong clock."""
    settings = EmbeddedSettings(
        directory=str(tmp_path_factory.mktemp("clocks")), idle_timeout=900, use_configured_pool=False
    )
    arena = Arena(settings, ensure_running(settings), prefect_server, tmp_path_factory.mktemp("unused"))
    try:
        arena.set_clock("schedd", request.param)
        yield settings
    finally:
        stop(settings)


def test_schedd_clock(arena: Arena, row: Row, new_flow: NewFlow, request: pytest.FixtureRequest) -> None:
    """schedd's clock 300 s off, leases of 8 s: workers live over two of them and their minute of grace"""
    flow = new_flow(SHORT_LEASE).start().compute()
    jobs = sorted(arena.job_ids())
    time.sleep(2 * LEASE + LATE + 5)  # what is tried
    row.expect(sorted(arena.job_ids(2)) == jobs, f"{arena.job_ids(2)} run, not {jobs}")
    flow.let_go()
    row.expect(flow.wait(150) == 0, f"the flow failed: {flow_message(arena, flow)}")
    row.gone(arena, flow.said("ended")["time"], 30, 30)
    row.judge(arena, [flow], ["Completed"], again=0)
    told = [line for line in flow.log.read_text().splitlines() if "clock of the schedd's host" in line]
    row.note = told[0].partition(" - ")[2] if told else "nothing was said of the clocks"
    words = "ahead of" if request.node.callspec.id == "ahead" else "behind"
    row.expect(len(told) == 1 and words in told[0], f"of the clocks it says {told}")
    row.check()


@long
def test_schedd_clock_and_orphans(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """schedd's clock 300 s off, SIGKILL of flow and supervisor, leases of 8 s: their jobs are kept no longer"""
    flow = new_flow(SHORT_LEASE).start().compute()
    # Scheduler and workers stand still: else they would leave by themselves.
    scheduler = arena.scheduler_of(arena.jobs()[0]["HTCDaskClusterName"])
    kill(scheduler, *(flow.runs(task) for task, _ in flow.order["late"]), number=signal.SIGSTOP)
    since = time.time()
    kill_at_once([flow.supervisor, flow.pid])
    within = LEASE + LATE + VACATE + 20
    try:
        wait_until(lambda: arena.job_ids() == [], within + 10, "the schedd ends the jobs")
    finally:
        kill(scheduler, number=signal.SIGCONT)
    row.gone(arena, since, within, within + 20)
    reasons = arena.condor("condor_history", "-limit", "2", "-af", "RemoveReason").stdout.splitlines()
    row.note = "; ".join(dict.fromkeys(reasons))
    row.expect([one for one in reasons if LEASE_REASON in one] == reasons, f"the jobs ended otherwise: {reasons}")
    row.judge(arena, [flow], ["Crashed"], again=0, sweep=True)
    row.check()
