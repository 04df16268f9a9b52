"""What a worker's own records become in the flow run's log, and how many."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_htcdask.worker.api_log_handler import BURST, INTERVAL, FlowRunLog, Quota

FLOW_RUN = "6d6b1f5e-0000-4000-8000-000000000002"


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What goes to Prefect's thread that sends logs; with a real server: test_worker_logs."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr("prefect.logging.handlers.emit_api_log", found.append)
    return found


def record(text: str, *arguments: Any, level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord("distributed.worker", level, "worker.py", 1, text, arguments, None)


def a_log(*secrets: str) -> FlowRunLog:
    return FlowRunLog(FLOW_RUN, "HTCondor job 12.0 on node7", secrets)


def test_a_record_is_the_flow_run_s_and_says_whence(sent: list[dict[str, Any]]) -> None:
    a_log().emit(record("unmanaged memory use is high: %s", "1 GiB"))
    (log,) = sent
    assert log["message"] == "HTCondor job 12.0 on node7: unmanaged memory use is high: 1 GiB"
    assert (log["flow_run_id"], log["name"], log["level"]) == (FLOW_RUN, "distributed.worker", logging.WARNING)


def test_no_secret_and_no_argument_of_a_task_is_sent(sent: list[dict[str, Any]]) -> None:
    log = a_log("pnu_secret", "")
    log.emit(record("cannot reach the API with pnu_secret"))
    log.emit(record("Compute Failed\nKey: work-1\nargs: ('password',)"))
    assert [one["message"].partition(": ")[2] for one in sent] == ["cannot reach the API with ***"]


def test_only_warnings_and_above(sent: list[dict[str, Any]]) -> None:
    log = a_log()
    assert log.level == logging.WARNING
    logger = logging.getLogger("htcdask-test")
    logger.addHandler(log)
    logger.setLevel(logging.DEBUG)
    logger.info("joined")
    logger.error("lost")
    assert [one["level"] for one in sent] == [logging.ERROR]


def test_many_and_long_records_are_cut(sent: list[dict[str, Any]]) -> None:
    log = a_log()
    for _ in range(1000):
        log.emit(record("x" * 100_000))
    assert len(sent) == BURST
    assert all(len(one["message"]) < 2_200 for one in sent)


def test_what_cannot_be_sent_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(log: Any) -> None:
        raise RuntimeError("no thread can be started")

    monkeypatch.setattr("prefect.logging.handlers.emit_api_log", fail)
    a_log().emit(record("one"))
    a_log().emit(record("%d", "not a number"))


def test_those_left_out_are_counted() -> None:
    quota = Quota(2, 10.0)
    assert [quota.take(0.0) for _ in range(5)] == [0, 0, None, None, None]
    assert quota.take(10.0) == 3
    assert quota.take(11.0) is None
    assert quota.take(1000.0) == 1


@given(st.lists(st.floats(0, 100), max_size=200))
def test_the_quota_holds_whatever_comes(pauses: list[float]) -> None:
    quota, now, taken, counted = Quota(), 0.0, 0, 0
    for pause in pauses:
        now += pause
        if (dropped := quota.take(now)) is not None:
            taken, counted = taken + 1, counted + dropped
    assert taken <= BURST + now / INTERVAL + 1e-6
    assert taken + counted <= len(pauses)
