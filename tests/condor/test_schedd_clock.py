"""The lease follows the schedd's clock, whatever this host's says."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from prefect_htcdask.cleanup.jobs import worker_jobs
from prefect_htcdask.condor import schedd as schedd_module
from prefect_htcdask.condor.address import ScheddAddress
from prefect_htcdask.condor.event_times import by_our_clock
from prefect_htcdask.condor.schedd import ScheddClient
from prefect_htcdask.supervisor import oneshot
from prefect_htcdask.supervisor.notifier import Notifier
from tests.support.cluster_fixtures import texts


class OtherClock(ScheddClient):
    """A schedd whose clock is `ahead` seconds ahead, and whose answers take `slow` seconds; no pool is needed."""

    def __init__(self, ahead: float, slow: float = 0.0) -> None:
        super().__init__(ScheddAddress())
        self.ahead, self.slow = ahead, slow
        self.edits: list[int] = []

    def _call(self, what: str, function: str, *args: Any, **kwargs: Any) -> Any:
        if function == "edit":
            self.edits.append(int(args[2]))
            return 1
        then = time.time()
        clock.passed += self.slow
        return [{"ServerTime": int(then + self.slow / 2 + self.ahead)}]

    def user(self) -> str:
        return "anne@example.org"

    def query(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        return list(self._call("", "query"))


class Clock:
    """The module's `time`, which passes only when told."""

    passed = 0.0

    def time(self) -> float:
        return 1_800_000_000.5 + self.passed


clock = Clock()


@pytest.fixture(autouse=True)
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    clock.passed = 0.0
    monkeypatch.setattr(schedd_module, "time", clock)
    monkeypatch.setattr(time, "time", clock.time)


@pytest.mark.parametrize("ahead", [-7200.0, -300.0, 0.0, 300.0, 7200.0])
def test_leases_begin_at_the_time_that_the_schedd_has(ahead: float) -> None:
    schedd = OtherClock(ahead)
    there = int(clock.time() + ahead)
    assert schedd.now() == there
    schedd.renew("true", 180)
    assert schedd.edits == [there + 180]
    assert schedd.clock_ahead == pytest.approx(ahead, abs=1)


@pytest.mark.parametrize(("ahead", "slow"), [(0.0, 50.0), (0.9, 0.0), (-0.9, 0.0), (20.0, 50.0), (-20.0, 50.0)])
def test_what_may_be_the_answer_s_own_time_is_no_difference(ahead: float, slow: float) -> None:
    schedd = OtherClock(ahead, slow)
    schedd.now()
    assert abs(schedd.clock_ahead) <= 1


@pytest.mark.parametrize(("ahead", "word"), [(31.0, "31 s ahead of"), (-300.0, "300 s behind")])
def test_clocks_that_are_apart_are_told_of_once(ahead: float, word: str) -> None:
    messages: list[dict[str, Any]] = []
    notifier = Notifier(messages.append, lambda record: "", several=False)
    for moment in (0.0, 29.0, -29.0):
        notifier.saw_clock(moment)
    assert messages == []
    for moment in (ahead, ahead + 1, ahead):
        notifier.saw_clock(moment)
    text = texts(messages, "log")
    assert text.count("clock of the schedd's host") == 1 and word in text
    assert "there 20" in text and "here 20" in text, "both clocks are named"


@pytest.mark.parametrize("ahead", [-300.0, 0.0, 300.0])
@pytest.mark.parametrize("slow", [0.0, 50.0])
def test_jobs_are_shown_and_judged_by_this_host_s_clock(
    ahead: float, slow: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = clock.time()
    there = now + ahead
    ad = {"ClusterId": 7, "ProcId": 0, "JobStatus": 2, "ServerTime": int(there), "QDate": now - 90}
    ad |= {"HTCDaskLeaseExpires": there + 60, "JobCurrentStartDate": there - 60}

    def query(*arguments: Any) -> list[dict[str, Any]]:
        clock.passed += slow
        return [ad]

    monkeypatch.setattr(oneshot, "call", query)
    (job,) = worker_jobs(SimpleNamespace(schedd=None))  # type: ignore[arg-type]
    assert job.lease_expires == pytest.approx(now + 60, abs=slow + 1)
    assert job.started == pytest.approx(now - 60, abs=slow + 1)
    assert job.submitted == now - 90, "the host that submits says when"
    if not ahead:
        assert job.lease_expires == now + 60, "an answer that took a while moves no lease"


def test_times_that_are_not_known_stay_unknown() -> None:
    assert by_our_clock({"QDate": 5, "HTCDaskLeaseExpires": None}, 300.0) == {"QDate": 5, "HTCDaskLeaseExpires": None}
