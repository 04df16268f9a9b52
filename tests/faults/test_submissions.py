"""The schedd is there, and does not take the jobs, or not all of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest

from prefect_htcdask.settings import ENV_PREFIX
from tests.faults.arena import Arena
from tests.faults.flow_process import FlowProcess
from tests.faults.row import Row, flow_message

pytestmark = [pytest.mark.pool, pytest.mark.faults]
long = pytest.mark.faults_long

NewFlow = Callable[..., FlowProcess]
RULE = {
    "SUBMIT_REQUIREMENT_NAMES": "Project",
    "SUBMIT_REQUIREMENT_Project": 'ProjectName =?= "physics"',
    "SUBMIT_REQUIREMENT_Project_REASON": '"ProjectName has to be physics"',
}


def fails(arena: Arena, row: Row, flow: FlowProcess, words: list[str]) -> None:
    """The flow fails at once with these words, and nothing is left of it."""
    since = time.time()
    flow.start()
    row.expect(flow.wait(60) != 0, "the flow did not fail")
    message = flow_message(arena, flow)
    row.note = f"after {time.time() - since:.1f} s: {message[:300]}"
    for word in words:
        row.expect(word in message, f"{word!r} is not in its message: {message}")
    row.expect("reached" not in message, f"the schedd was reached: {message}")
    row.gone(arena, flow.said("ended").get("time", time.time()), 20, 20)
    row.judge(arena, [flow], ["Failed"], again=0)
    row.check()


def test_submission_refused(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """schedd refuses the workers by a SUBMIT_REQUIREMENT: the flow fails with its words and the setting"""
    flow = new_flow({f"{ENV_PREFIX}WORKER_EXTRA_SUBMIT": json.dumps({"+ProjectName": '"cms"'})})
    with arena.configured(**RULE):
        fails(arena, row, flow, ["ProjectName has to be physics", "worker.extra_submit['+ProjectName'] = '\"cms\"'"])


@long
@pytest.mark.parametrize(
    ("command", "value", "words"),
    [
        pytest.param("+ProjectName", "cms physics", ["a string needs quotes of its own"], id="quotes"),
        pytest.param("+X", "1 +", ["no ClassAd expression"], id="expression"),
        pytest.param("x509userproxy", "/no/such/proxy", ["cannot be read"], id="proxy"),
        pytest.param("notification", "sometimes", ["Notification must be"], id="value"),
    ],
)
def test_submission_that_says_nonsense(
    arena: Arena, row: Row, new_flow: NewFlow, command: str, value: str, words: list[str]
) -> None:
    """worker.extra_submit that HTCondor cannot take: the flow fails with its words and the setting"""
    flow = new_flow({f"{ENV_PREFIX}WORKER_EXTRA_SUBMIT": json.dumps({command: value})})
    fails(arena, row, flow, [f"worker.extra_submit[{command!r}] = {value!r}", *words])


def test_submission_beyond_a_limit(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """schedd takes one job of ours at a time (MAX_JOBS_PER_OWNER) where two are wanted: one worker does it all"""
    with arena.configured(MAX_JOBS_PER_OWNER="1"):
        flow = new_flow(late=[["g0", "gated"]]).start().compute()
        row.expect(len(arena.job_ids()) == 1, f"{arena.job_ids()} are in the queue")
        flow.let_go()
        row.expect(flow.wait(90) == 0, f"the flow failed: {flow_message(arena, flow)}")
        row.gone(arena, flow.said("ended")["time"], 20, 20)
    row.judge(arena, [flow], ["Completed"], again=0)
    told = [line for line in flow.log.read_text().splitlines() if "MAX_JOBS_PER_OWNER" in line]
    row.note = told[0].partition(" - ")[2] if told else "nothing was said of the limit"
    row.expect(0 < len(told) < 5, f"of the limit it says {told}")
    row.check()


@long
def test_submission_in_parts(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """schedd takes one job in a submission (MAX_JOBS_PER_SUBMISSION) where two are wanted: there are two submissions"""
    with arena.configured(MAX_JOBS_PER_SUBMISSION="1"):
        flow = new_flow().start().compute()
        row.expect(len(arena.job_ids()) == 2, f"{arena.job_ids()} are in the queue")
        flow.let_go()
        row.expect(flow.wait(90) == 0, f"the flow failed: {flow_message(arena, flow)}")
        row.gone(arena, flow.said("ended")["time"], 20, 20)
    row.judge(arena, [flow], ["Completed"], again=0)
    row.check()
