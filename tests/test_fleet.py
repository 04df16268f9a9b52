"""Bookkeeping of jobs and workers."""

from __future__ import annotations

from typing import Any

from prefect_htcdask.condor.job_events import apply
from prefect_htcdask.supervisor.fleet import Fleet


def tell(fleet: Fleet, event: str, job: str, **data: Any) -> bool:
    change = apply(fleet.table, event, job, 1.0, data)
    return fleet.saw_change(change) if change else False


def answer(**idle: float) -> dict[str, Any]:
    return {"idle": {f"htcdask-{job[1:].replace('_', '.')}-0": seconds for job, seconds in idle.items()}}


def a_fleet(*jobs: str) -> Fleet:
    fleet = Fleet()
    fleet.submitted_jobs(jobs, "default", 1.0)
    return fleet


def test_a_job_is_pending_until_its_worker_joins() -> None:
    fleet = a_fleet("1.0", "1.1", "1.10")
    tell(fleet, "EXECUTE", "1.0")
    supply = fleet.supply(answer())
    assert supply.pending == ("1.0", "1.1", "1.10")
    assert supply.unstarted == 2
    assert fleet.saw_workers(["htcdask-1.0-0", "somebody-else"]) == ["1.0"]
    assert fleet.saw_workers(["htcdask-1.0-0"]) == []
    supply = fleet.supply(answer(_1_0=4.0), now=100.0)
    assert (supply.pending, supply.idle, supply.busy) == (("1.1", "1.10"), {"htcdask-1.0-0": 96.0}, ())


def test_a_worker_without_an_idle_time_is_busy() -> None:
    fleet = a_fleet("1.0")
    fleet.saw_workers(["htcdask-1.0-0"])
    assert fleet.supply(answer()).busy == ("htcdask-1.0-0",)
    assert fleet.supply(None).busy == ("htcdask-1.0-0",)


def test_who_is_told_to_leave_counts_as_gone() -> None:
    fleet = a_fleet("1.0", "1.1")
    fleet.saw_workers(["htcdask-1.0-0"])
    fleet.leaving.update(["1.0", "1.1"])
    assert fleet.supply(answer()).total == 0


def test_a_leaving_worker_whose_job_starts_again_is_back() -> None:
    fleet = a_fleet("1.0")
    fleet.saw_workers(["htcdask-1.0-0"])
    fleet.leaving.add("1.0")
    fleet.saw_workers(["htcdask-1.0-0"])
    assert fleet.supply(answer()).total == 0
    fleet.saw_workers([])
    fleet.saw_workers(["htcdask-1.0-1"])
    assert fleet.supply(answer()).total == 1


def test_held_jobs_are_no_supply() -> None:
    fleet = a_fleet("1.0", "1.1")
    tell(fleet, "JOB_HELD", "1.0", HoldReasonCode=1)
    assert fleet.supply(answer()).pending == ("1.1",)
    assert [record.job_id for record in fleet.queued_jobs()] == ["1.0", "1.1"]


def test_failures_to_start_are_counted_in_a_row() -> None:
    fleet = a_fleet("1.0", "1.1", "1.2", "1.3", "1.4")
    assert tell(fleet, "JOB_TERMINATED", "1.0", ReturnValue=1)
    assert tell(fleet, "JOB_HELD", "1.1", HoldReasonCode=35)
    assert fleet.failures == 2
    fleet.saw_workers(["htcdask-1.2-0"])
    assert fleet.failures == 0
    assert not tell(fleet, "JOB_TERMINATED", "1.2", ReturnValue=1), "its worker had joined"
    assert not tell(fleet, "JOB_HELD", "1.3", HoldReasonCode=1), "a user held it"
    fleet.leaving.add("1.4")
    assert not tell(fleet, "JOB_TERMINATED", "1.4", ReturnValue=0), "it was told to go"
    assert fleet.failures == 0


def test_an_eviction_is_no_failure() -> None:
    fleet = a_fleet("1.0")
    tell(fleet, "EXECUTE", "1.0")
    assert not tell(fleet, "JOB_EVICTED", "1.0")
    assert (fleet.evictions, fleet.failures) == (1, 0)
    assert fleet.supply(answer()).pending == ("1.0",)


def test_the_summary_adds_up() -> None:
    fleet = Fleet()
    for event, when in (("SUBMIT", 0.0), ("EXECUTE", 10.0), ("JOB_TERMINATED", 3610.0)):
        apply(fleet.table, event, "10.0", when, {"SlotName": "slot1@a"})
    for event, when in (("SUBMIT", 0.0), ("EXECUTE", 100.0)):
        apply(fleet.table, event, "9.0", when, {"SlotName": "slot1@b"})
    fleet.saw_workers(["htcdask-9.0-0", "htcdask-10.0-0"])
    summary = fleet.summary(now=1900.0)
    assert summary["worker_hours"] == 1.5
    assert summary["job_ids"] == ["9.0", "10.0"]
    assert (summary["jobs"], summary["peak"], summary["left"]) == (2, 2, 1)
    assert summary["hosts"] == ["slot1@a", "slot1@b"]
