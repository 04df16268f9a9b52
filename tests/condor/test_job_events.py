"""From job events and job ads to what is known of a job."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_htcdask.condor.job_codes import JobState
from prefect_htcdask.condor.job_events import JobRecord, JobTable, apply, events_of_ad

JOB = "7.0"
EVENTS = [
    "SUBMIT",
    "EXECUTE",
    "JOB_EVICTED",
    "SHADOW_EXCEPTION",
    "JOB_RECONNECT_FAILED",
    "JOB_HELD",
    "JOB_RELEASED",
    "JOB_TERMINATED",
    "JOB_ABORTED",
    "IMAGE_SIZE",
    "GENERIC",
    "JOB_DISCONNECTED",
    "CLUSTER_REMOVE",
]
histories = st.lists(st.tuples(st.sampled_from(EVENTS), st.floats(-1e3, 1e4)), max_size=30)


def after(*events: str, data: dict[str, Any] | None = None) -> tuple[JobTable, list[str]]:
    table = JobTable()
    changes = [apply(table, event, JOB, float(when), data or {}) for when, event in enumerate(events)]
    return table, [change.what for change in changes if change]


@pytest.mark.parametrize(
    ("events", "state", "said"),
    [
        (["SUBMIT"], JobState.IDLE, ["submitted"]),
        (["SUBMIT", "EXECUTE"], JobState.RUNNING, ["submitted", "started"]),
        (["SUBMIT", "EXECUTE", "JOB_TERMINATED"], JobState.EXITED, ["submitted", "started", "exited"]),
        (["SUBMIT", "EXECUTE", "JOB_EVICTED"], JobState.IDLE, ["submitted", "started", "evicted"]),
        (["SUBMIT", "SHADOW_EXCEPTION"], JobState.IDLE, ["submitted", "evicted"]),
        (["SUBMIT", "JOB_HELD"], JobState.HELD, ["submitted", "held"]),
        (["SUBMIT", "JOB_HELD", "JOB_EVICTED"], JobState.HELD, ["submitted", "held"]),
        (["SUBMIT", "JOB_HELD", "JOB_RELEASED"], JobState.IDLE, ["submitted", "held", "released"]),
        (["SUBMIT", "JOB_RELEASED"], JobState.IDLE, ["submitted"]),
        (["SUBMIT", "EXECUTE", "JOB_EVICTED", "JOB_ABORTED"], JobState.REMOVED, ["submitted", "started", "evicted",
                                                                                   "removed"]),
        (["JOB_ABORTED", "SUBMIT", "EXECUTE", "JOB_HELD"], JobState.REMOVED, ["removed"]),
        (["EXECUTE"], JobState.RUNNING, ["started"]),
    ],
)  # fmt: skip
def test_transitions(events: list[str], state: JobState, said: list[str]) -> None:
    table, changes = after(*events)
    assert (table.records[JOB].state, changes) == (state, said)


@pytest.mark.parametrize("event", ["GENERIC", "CLUSTER_REMOVE", "CLUSTER_SUBMIT", "JOB_DISCONNECTED"])
def test_an_event_that_is_no_job_s_makes_no_job(event: str) -> None:
    table, changes = after(event)
    assert (table.records, changes) == ({}, [])


@given(histories)
def test_no_history_breaks_what_must_hold(history: list[tuple[str, float]]) -> None:
    table = JobTable()
    ended: JobState | None = None
    for event, when in history:
        change = apply(table, event, JOB, when, {})
        record = table.records.get(JOB)
        if record is None:
            continue
        assert record.run_seconds >= 0
        assert (record.started is not None) == (record.state is JobState.RUNNING)
        if ended is not None:
            assert record.state is ended, "an end is final"
            assert change is None
        if not record.in_queue:
            ended = record.state


def test_run_seconds_add_up_over_starts() -> None:
    table, _ = after("SUBMIT", "EXECUTE", "SUBMIT", "JOB_EVICTED", "EXECUTE", "JOB_TERMINATED")
    record = table.records[JOB]
    assert (record.run_seconds, record.starts, record.evictions) == (3.0, 2, 1)


def test_a_second_start_ends_the_first_run() -> None:
    table, _ = after("SUBMIT", "EXECUTE", "EXECUTE", "JOB_TERMINATED")
    assert table.records[JOB].run_seconds == 2.0


def test_a_job_whose_input_is_being_spooled_is_not_held() -> None:
    table, changes = after("SUBMIT", "JOB_HELD", data={"HoldReasonCode": 16})
    assert (table.records[JOB].state, changes) == (JobState.IDLE, ["submitted"])


def test_what_htcondor_says_is_kept() -> None:
    table = JobTable()
    apply(table, "JOB_HELD", JOB, 1, {"HoldReason": "no file", "HoldReasonCode": 13, "HoldReasonSubCode": 2})
    record = table.records[JOB]
    assert (record.reason, record.hold_code, record.hold_subcode, record.holds) == ("no file", 13, 2, 1)
    apply(table, "JOB_RELEASED", JOB, 2, {})
    apply(table, "EXECUTE", JOB, 3, {"SlotName": "slot1@host", "ExecuteHost": "<1.2.3.4>"})
    assert record.host == "slot1@host"
    apply(table, "IMAGE_SIZE", JOB, 4, {"ResidentSetSize": 2048})
    apply(table, "IMAGE_SIZE", JOB, 5, {"MemoryUsage": 1})
    assert record.memory_mib == 2.0
    apply(table, "JOB_TERMINATED", JOB, 6, {"TerminatedNormally": False, "TerminatedBySignal": 9})
    assert (record.exit_signal, record.exit_code) == (9, None)


AD = {"JobStatus": 1, "EnteredCurrentStatus": 50, "QDate": 10}


@pytest.mark.parametrize(
    ("known", "ad", "events"),
    [
        (None, {}, ["SUBMIT"]),
        (None, {"JobStatus": 2, "JobCurrentStartDate": 20}, ["SUBMIT", "EXECUTE"]),
        (None, {"JobStatus": 5}, ["SUBMIT", "JOB_HELD"]),
        (JobState.IDLE, {}, []),
        (JobState.RUNNING, {}, ["JOB_EVICTED"]),
        (JobState.HELD, {}, ["JOB_RELEASED"]),
        (JobState.RUNNING, {"JobStatus": 2}, []),
        (JobState.RUNNING, {"JobStatus": 7}, []),
        (JobState.IDLE, {"JobStatus": 2}, ["EXECUTE"]),
        (JobState.RUNNING, {"JobStatus": 3}, ["JOB_ABORTED"]),
        (JobState.RUNNING, {"JobStatus": 4, "ExitCode": 1}, ["JOB_TERMINATED"]),
    ],
)
def test_an_ad_tells_the_events_that_led_to_it(known: JobState | None, ad: dict[str, Any], events: list[str]) -> None:
    record = JobRecord(JOB, state=known) if known else None
    assert [event for event, _, _ in events_of_ad(record, {**AD, **ad})] == events


RAN = {"JobCurrentStartDate": 30, "JobCurrentStartExecutingDate": 31, "LastRemoteHost": "slot1@a"}


@pytest.mark.parametrize(
    ("state", "seen", "ad", "events"),
    [
        (None, None, {"JobStatus": 4, **RAN}, ["SUBMIT", "EXECUTE", "JOB_TERMINATED"]),
        (JobState.IDLE, None, {"JobStatus": 4, **RAN}, ["EXECUTE", "JOB_TERMINATED"]),
        (JobState.IDLE, None, {"JobStatus": 3, **RAN}, ["EXECUTE", "JOB_ABORTED"]),
        (JobState.IDLE, 20.0, {"JobStatus": 1, **RAN}, ["EXECUTE", "JOB_EVICTED"]),
        (JobState.HELD, 20.0, {"JobStatus": 5, **RAN}, ["EXECUTE", "JOB_HELD"]),
        # A run that was seen, and a start that never came to running.
        (JobState.IDLE, 30.0, {"JobStatus": 3, **RAN}, ["JOB_ABORTED"]),
        (JobState.IDLE, 20.0, {"JobStatus": 5, **RAN, "JobCurrentStartExecutingDate": 21}, ["JOB_HELD"]),
    ],
)
def test_a_run_between_two_looks_counts(
    state: JobState | None, seen: float | None, ad: dict[str, Any], events: list[str]
) -> None:
    table = JobTable()
    if state is not None:
        table.records[JOB] = JobRecord(JOB, state=state, last_start=seen)
    told = list(events_of_ad(table.records.get(JOB), {**AD, **ad}))
    assert [event for event, _, _ in told] == events
    for event, when, data in told:
        apply(table, event, JOB, when, data)
    record = table.records[JOB]
    if "EXECUTE" in events:
        assert (record.starts, record.run_seconds, record.host) == (1, 20.0, "slot1@a")
    else:
        assert (record.starts, record.run_seconds) == (0, 0.0)


@given(st.lists(st.fixed_dictionaries({"JobStatus": st.integers(1, 7), "ExitBySignal": st.booleans()}), max_size=12))
def test_the_table_agrees_with_the_last_ad(ads: list[dict[str, Any]]) -> None:
    table = JobTable()
    states = {1: JobState.IDLE, 2: JobState.RUNNING, 3: JobState.REMOVED, 4: JobState.EXITED, 5: JobState.HELD}
    for ad in ads:
        record = table.records.get(JOB)
        over = record is not None and not record.in_queue
        for event, when, data in events_of_ad(record, {**AD, **ad}):
            apply(table, event, JOB, when, data)
        if not over:
            assert table.records[JOB].state is states.get(ad["JobStatus"], JobState.RUNNING)
