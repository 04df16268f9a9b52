"""Bookkeeping of jobs and workers."""

from __future__ import annotations

import dataclasses
from typing import Any

from prefect_htcdask.condor.job_events import apply
from prefect_htcdask.supervisor.policy import Demand, PolicySettings, Supply, Target, decide
from prefect_htcdask.supervisor.worker_table import WorkerTable


def tell(worker_table: WorkerTable, event: str, job: str, **data: Any) -> bool:
    change = apply(worker_table.table, event, job, 1.0, data)
    return worker_table.get(job).saw_change(change) if change else False


def answer(**idle: float) -> dict[str, Any]:
    return {"idle": {f"htcdask-{job[1:].replace('_', '.')}-0": seconds for job, seconds in idle.items()}}


def supply_of(worker_table: WorkerTable, answer: dict[str, Any] | None, now: float = 0.0) -> Supply:
    return worker_table.supplies(answer, now)["default"]


def workers_of(*jobs: str) -> WorkerTable:
    worker_table = WorkerTable()
    worker_table.submitted_jobs(jobs, "default", 1.0)
    return worker_table


def test_a_job_is_pending_until_its_worker_joins() -> None:
    worker_table = workers_of("1.0", "1.1", "1.10")
    tell(worker_table, "EXECUTE", "1.0")
    supply = supply_of(worker_table, answer())
    assert supply.pending == ("1.0", "1.1", "1.10")
    assert supply.unstarted == 2
    assert worker_table.saw_workers(["htcdask-1.0-0", "somebody-else"]) == [worker_table.get("1.0")]
    assert worker_table.saw_workers(["htcdask-1.0-0"]) == []
    supply = supply_of(worker_table, answer(_1_0=4.0), now=100.0)
    assert (supply.pending, supply.idle, supply.busy) == (("1.1", "1.10"), {"htcdask-1.0-0": 96.0}, ())


def test_a_worker_without_an_idle_time_is_busy() -> None:
    worker_table = workers_of("1.0")
    worker_table.saw_workers(["htcdask-1.0-0"])
    assert supply_of(worker_table, answer()).busy == ("htcdask-1.0-0",)
    assert supply_of(worker_table, None).busy == ("htcdask-1.0-0",)


def test_who_is_told_to_leave_counts_as_gone() -> None:
    worker_table = workers_of("1.0", "1.1")
    worker_table.saw_workers(["htcdask-1.0-0"])
    worker_table.mark_leaving(["1.0", "1.1"])
    assert supply_of(worker_table, answer()).total == 0


def test_who_could_not_leave_is_asked_again_ever_later() -> None:
    worker_table = workers_of("1.0", "1.1")
    name, worker = "htcdask-1.0-0", worker_table.get("1.0")
    how = PolicySettings(target=Target(fixed=0))
    tries, now = [], 0.0
    while now < 300:
        worker_table.saw_workers([name, "htcdask-1.1-0"])
        supply = supply_of(worker_table, answer(_1_0=1000.0), now)
        if name in decide(Demand(), supply, how, now).retire:
            tries.append(now)
            # Its results find no other place.
            assert worker_table.mark_retiring([name, "htcdask-2.0-0"]) == {name: worker}
            assert supply_of(worker_table, answer()).retiring == (name,)
            worker.retire_failed(now)
        now += 1
    assert tries == [0, 2, 6, 14, 30, 62, 122, 182, 242]
    # One that got a task, and another time again, is none of that kind.
    worker.retire_failed(1000.0)
    assert (worker.retire_pause, worker.retire_at) == (2.0, 1002.0)
    worker_table.saw_workers(["htcdask-1.1-0"])
    assert (worker.retire_pause, worker.retire_at) == (0.0, 0.0)


def test_a_leaving_worker_whose_job_starts_again_is_back() -> None:
    worker_table = workers_of("1.0")
    worker_table.saw_workers(["htcdask-1.0-0"])
    worker_table.mark_leaving(["1.0"])
    worker_table.saw_workers(["htcdask-1.0-0"])
    assert supply_of(worker_table, answer()).total == 0
    worker_table.saw_workers([])
    worker_table.saw_workers(["htcdask-1.0-1"])
    assert supply_of(worker_table, answer()).total == 1


def test_held_jobs_are_no_supply() -> None:
    worker_table = workers_of("1.0", "1.1")
    tell(worker_table, "JOB_HELD", "1.0", HoldReasonCode=1)
    assert supply_of(worker_table, answer()).pending == ("1.1",)
    assert [record.job_id for record in worker_table.queued_jobs()] == ["1.0", "1.1"]


def test_what_is_a_failure_to_start() -> None:
    worker_table = workers_of("1.0", "1.1", "1.2", "1.3", "1.4", "1.5")
    assert tell(worker_table, "JOB_TERMINATED", "1.0", ReturnValue=1)
    assert tell(worker_table, "JOB_ABORTED", "1.5", Reason="by the administrator"), "nor may these be replaced for ever"
    assert tell(worker_table, "JOB_HELD", "1.1", HoldReasonCode=35)
    worker_table.saw_workers(["htcdask-1.2-0"])
    assert not tell(worker_table, "JOB_TERMINATED", "1.2", ReturnValue=1), "its worker had joined"
    assert not tell(worker_table, "JOB_HELD", "1.3", HoldReasonCode=1), "a user held it"
    worker_table.mark_leaving(["1.4"])
    assert not tell(worker_table, "JOB_TERMINATED", "1.4", ReturnValue=0), "it was told to go"


def test_an_eviction_is_no_failure() -> None:
    worker_table = workers_of("1.0")
    tell(worker_table, "EXECUTE", "1.0")
    assert not tell(worker_table, "JOB_EVICTED", "1.0")
    assert worker_table.summary(0.0)["evicted"] == 1
    assert supply_of(worker_table, answer()).pending == ("1.0",)


def test_the_summary_adds_up() -> None:
    worker_table = WorkerTable()
    for event, when in (("SUBMIT", 0.0), ("EXECUTE", 10.0), ("JOB_TERMINATED", 3610.0)):
        apply(worker_table.table, event, "10.0", when, {"SlotName": "slot1@a"})
    for event, when in (("SUBMIT", 0.0), ("EXECUTE", 100.0)):
        apply(worker_table.table, event, "9.0", when, {"SlotName": "slot1@b"})
    worker_table.saw_workers(["htcdask-9.0-0", "htcdask-10.0-0"])
    summary = worker_table.summary(now=1900.0)
    assert summary["worker_hours"] == 1.5
    assert summary["job_ids"] == ["9.0", "10.0"]
    assert (summary["jobs"], summary["peak"], summary["left"]) == (2, 2, 1)
    assert summary["hosts"] == ["slot1@a", "slot1@b"]


def two_groups() -> WorkerTable:
    worker_table = WorkerTable(("cpu", "gpu"))
    worker_table.submitted_jobs(["1.0", "1.1"], "cpu", 1.0)
    worker_table.submitted_jobs(["2.0", "2.1"], "gpu", 1.0)
    for job in ("1.0", "1.1", "2.0"):
        tell(worker_table, "EXECUTE", job)
    worker_table.saw_workers(["htcdask-1.0-0", "htcdask-1.1-0", "htcdask-2.0-0"])
    return worker_table


def test_each_group_has_its_own_supply() -> None:
    supplies = two_groups().supplies({**answer(_1_0=3.0), "holding": ["htcdask-1.0-0"]}, 10.0)
    cpu, gpu = supplies["cpu"], supplies["gpu"]
    assert (cpu.pending, cpu.idle, cpu.busy) == ((), {"htcdask-1.0-0": 7.0}, ("htcdask-1.1-0",))
    assert (gpu.pending, gpu.unstarted, gpu.idle, gpu.busy) == (("2.1",), 1, {}, ("htcdask-2.0-0",))
    assert (cpu.holding, gpu.holding) == ({"htcdask-1.0-0"}, frozenset())


def test_each_group_has_its_own_demand() -> None:
    told = {"queued": 5, "stacked": 1, "coming": {10: 2}, "work": 7.5, "unknown": 4, "task_seconds": 1.5}
    demands = two_groups().demands(
        {"groups": {"gpu": told}, "in_hand": {"htcdask-1.1-0": 2, "htcdask-2.0-0": 3, "somebody": 9}}
    )
    assert (demands["cpu"].queued, demands["cpu"].in_hand) == (0, {"htcdask-1.1-0": 2})
    gpu = demands["gpu"]
    assert (gpu.queued, gpu.in_hand, gpu.coming) == (5, {"htcdask-2.0-0": 3}, {10: 2})
    assert (gpu.stacked, gpu.work, gpu.unknown, gpu.task_seconds) == (1, 7.5, 4, 1.5)


def test_the_last_task_of_a_worker_that_drains_asks_for_no_other_worker() -> None:
    worker_table = two_groups()
    told = {**answer(), "groups": {}, "in_hand": {"htcdask-1.0-0": 1, "htcdask-1.1-0": 1}, "closing": ["htcdask-1.0-0"]}
    demand, supply = worker_table.demands(told)["cpu"], worker_table.supplies(told, 10.0)["cpu"]
    how = PolicySettings(target=Target(maximum=9))
    assert (supply.busy, supply.retiring) == (("htcdask-1.1-0",), ("htcdask-1.0-0",))
    assert not decide(demand, supply, how, 10.0).changes
    # One that is queued is for another worker, and so is a number or minimum that the user asked for.
    queued = dataclasses.replace(demand, queued=1)
    assert decide(queued, supply, how, 10.0).submit == 1
    assert decide(demand, supply, PolicySettings(target=Target(minimum=2, maximum=9)), 10.0).submit == 1


def test_a_worker_that_leaves_by_itself_counts_as_gone() -> None:
    worker_table = two_groups()
    supplies = worker_table.supplies({**answer(_1_0=3.0), "closing": ["htcdask-1.0-0", "htcdask-2.0-0"]}, 10.0)
    assert (supplies["cpu"].total, supplies["gpu"].total) == (1, 1)
    assert (supplies["cpu"].retiring, supplies["gpu"].retiring) == (("htcdask-1.0-0",), ("htcdask-2.0-0",))


def test_a_job_of_a_group_that_nobody_knows_counts_as_of_the_default_group() -> None:
    worker_table = two_groups()
    worker_table.submitted_jobs(["3.0"], "highmem", 1.0)
    assert worker_table.supplies(answer(), 0.0)["cpu"].pending == ("3.0",)


def test_the_summary_tells_groups_where_there_are_several() -> None:
    groups = two_groups().summary(now=3601.0)["groups"]
    assert {name: (group["jobs"], group["worker_hours"], group["peak"]) for name, group in groups.items()} == {
        "cpu": (2, 2.0, 2),
        "gpu": (2, 1.0, 1),
    }
    assert "groups" not in workers_of("1.0").summary(now=1.0)
