"""How many events there are of jobs, and what they say."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from prefect_htcdask.supervisor.report.events import JobEvents, cleanup_event, scaled_event


def message(what: str, job_id: str, **more: Any) -> dict[str, Any]:
    return {"kind": "job", "what": what, "job_id": job_id, "group": "cpu", "host": "slot1@a", "category": None, **more}


def held(job_id: str) -> dict[str, Any]:
    return message("held", job_id, category="held_memory", summary="too much", remedy="raise workers.cpu.memory")


def test_the_category_can_be_matched_on() -> None:
    events = JobEvents("c1")
    events.take(held("1.0"))
    (event,) = events.due(0.0)
    assert event.name == "htcdask.job.held"
    assert event.resource == {
        "prefect.resource.id": "htcdask.worker-group.c1.cpu",
        "prefect.resource.name": "cpu",
        "htcdask.cluster": "c1",
        "htcdask.group": "cpu",
        "htcdask.category": "held_memory",
    }
    assert event.payload == {
        "group": "cpu",
        "count": 1,
        "jobs": ["1.0"],
        "hosts": ["slot1@a"],
        "category": "held_memory",
        "summary": "too much",
        "remedy": "raise workers.cpu.memory",
    }


def test_what_is_no_event_makes_none() -> None:
    events = JobEvents("c1")
    for what in ("submitted", "joined", "memory", "released"):
        events.take(message(what, "1.0"))
    assert events.due(0.0, last=True) == []


def test_thousands_of_workers_are_a_few_events() -> None:
    events, told = JobEvents("c1"), []
    for second in range(600):
        for number in range(second * 10, second * 10 + 10):
            events.take(message("started", f"7.{number}"))
        told += events.due(float(second))
    told += events.due(600.0, last=True)
    assert sum(event.payload["count"] for event in told) == 6000
    assert len(told) < 20
    assert all(len(event.payload["jobs"]) <= 20 for event in told)
    assert told[0].payload["count"] == 10, "the first ones at once"


def test_after_a_quiet_time_it_is_news_again() -> None:
    events = JobEvents("c1")
    for now in (0.0, 2.0, 6.0, 14.0, 30.0):
        events.take(held("1.0"))
        assert len(events.due(now)) == 1
    events.take(held("1.1"))
    assert events.due(31.0) == []
    assert len(events.due(200.0)) == 1
    events.take(held("1.2"))
    assert len(events.due(201.0)) == 1


@given(st.lists(st.tuples(st.sampled_from(["started", "held", "evicted", "removed", "exited", "joined"]),
                          st.sampled_from(["cpu", "gpu"]), st.floats(0, 100)), max_size=60))  # fmt: skip
def test_no_job_is_left_out_of_the_count(history: list[tuple[str, str, float]]) -> None:
    events, now, told = JobEvents("c1"), 0.0, []
    for what, group, pause in history:
        now += pause
        events.take(message(what, "1.0", group=group))
        told += events.due(now)
    told += events.due(now, last=True)
    counted: Counter[tuple[str, str]] = Counter()
    for event in told:
        counted[event.name, event.payload["group"]] += event.payload["count"]
    expected = Counter((f"htcdask.job.{what}", group) for what, group, _ in history if what != "joined")
    assert counted == expected


def test_cleanups() -> None:
    assert cleanup_event("f", 3, ["c1"], [], by="hook").name == "htcdask.cleanup.succeeded"
    failed = cleanup_event("f", 3, ["c1"], ["no schedd"], by="supervisor")
    assert (failed.name, failed.payload["problems"]) == ("htcdask.cleanup.failed", ["no schedd"])
    assert failed.resource == {"prefect.resource.id": "htcdask.flow-run.f", "htcdask.by": "supervisor"}


def test_decisions() -> None:
    event = scaled_event("c1", {"kind": "decision", "group": "gpu", "target": 4, "submit": 2, "text": "why"})
    assert event.name == "htcdask.cluster.scaled"
    assert event.payload == {"group": "gpu", "target": 4, "submit": 2, "reason": "why"}
