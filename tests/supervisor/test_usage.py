"""What workers cost and what that was for, and which jobs are worth a row."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from prefect_htcdask.condor.job_events import apply
from prefect_htcdask.condor.submit_description import MIB, WorkerSpec
from prefect_htcdask.supervisor.policy import Supply, Target
from prefect_htcdask.supervisor.protocol import GroupPlan, ReportPlan
from prefect_htcdask.supervisor.report.progress import Progress
from prefect_htcdask.supervisor.report.usage import group_usage, job_rows, job_states, percentile
from prefect_htcdask.supervisor.worker_group import WorkerGroup
from prefect_htcdask.supervisor.worker_table import WorkerTable

SPEC = WorkerSpec(cpus=2, memory=2048 * MIB)


class Jobs:
    """Workers, told what happens."""

    def __init__(self, *job_ids: str) -> None:
        self.worker_table = WorkerTable()
        self.worker_table.submitted_jobs(job_ids, "default", 100.0)

    def tell(self, event: str, job: str, when: float, **data: Any) -> None:
        change = apply(self.worker_table.table, event, job, when, data)
        if change is not None:
            self.worker_table.get(job).saw_change(change)

    def account(self, now: float, spent: float = 0.0) -> dict[str, Any]:
        return group_usage(self.worker_table, "default", SPEC, [3.0], 5, spent, now)

    def rows(self, most: int = 50, now: float = 1000.0) -> list[dict[str, Any]]:
        return job_rows(self.worker_table, {"default": SPEC}, most, now)


def test_an_account_of_jobs_that_wait_run_are_evicted_and_end() -> None:
    jobs = Jobs("1.0", "1.1", "1.2")
    jobs.tell("EXECUTE", "1.0", 110.0, SlotName="slot1@a")
    jobs.tell("EXECUTE", "1.1", 130.0, SlotName="slot1@b")
    jobs.tell("IMAGE_SIZE", "1.1", 140.0, MemoryUsage=300)
    jobs.tell("JOB_EVICTED", "1.0", 150.0)
    jobs.tell("EXECUTE", "1.0", 190.0, SlotName="slot1@b")
    jobs.tell("JOB_TERMINATED", "1.1", 200.0, ReturnValue=0)
    account = jobs.account(now=210.0, spent=99.0)
    assert account["worker_seconds"] == 40 + 20 + 70
    assert (account["jobs"], account["started"], account["evictions"], account["holds"]) == (3, 2, 1, 0)
    assert (account["wait_median"], account["wait_p95"]) == (20.0, 30.0), "of a job's first start alone"
    assert (account["peak_memory_mib"], account["memory_mib"]) == (300, 2048)
    assert (account["task_seconds"], account["done"], account["boot_median"]) == (99.0, 5, 3.0)
    assert job_states(jobs.worker_table) == {"running": 1, "exited": 1, "idle": 1}
    # At the end all are told to leave; what happened before still did.
    jobs.worker_table.mark_leaving(["1.0", "1.2"])
    jobs.tell("JOB_EVICTED", "1.0", 210.0)
    jobs.tell("JOB_ABORTED", "1.0", 210.0, Reason="closed")
    assert jobs.account(now=300.0)["evictions"] == 1


def test_what_went_wrong_comes_first_and_a_hold_keeps_its_reason() -> None:
    jobs = Jobs(*(f"1.{index}" for index in range(6)))
    for index in range(5):
        jobs.tell("EXECUTE", f"1.{index}", 110.0 + index, SlotName=f"slot{index}@a")
    jobs.tell("JOB_HELD", "1.1", 120.0, HoldReason="memory usage exceeded", HoldReasonCode=34)
    jobs.worker_table.mark_leaving(["1.1"])
    jobs.tell("JOB_ABORTED", "1.1", 121.0, Reason="held workers are replaced")
    jobs.tell("JOB_TERMINATED", "1.2", 140.0, ReturnValue=3)
    jobs.tell("JOB_EVICTED", "1.3", 140.0)
    jobs.tell("JOB_TERMINATED", "1.4", 150.0, ReturnValue=0)
    rows = jobs.rows()
    assert [row["id"] for row in rows] == ["1.2", "1.1", "1.3", "1.0", "1.4", "1.5"]
    by_id = {row["id"]: row for row in rows}
    assert "memory" in by_id["1.1"]["reason"] and by_id["1.1"]["state"] == "removed"
    assert "exit status 3" in by_id["1.2"]["reason"] and "evicted once" in by_id["1.3"]["reason"]
    assert (by_id["1.4"]["start"], by_id["1.4"]["end"], by_id["1.4"]["reason"]) == (114.0, 150.0, "")
    assert by_id["1.4"]["core_hours"] == 36 * 2 / 3600
    assert [row["id"] for row in jobs.rows(most=2)] == ["1.2", "1.1"]


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1.0))
def test_a_percentile_is_one_of_the_values_and_bounds_that_share(values: list[float], share: float) -> None:
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values)
    assert sum(value < found for value in values) < share * len(values)


def test_thousands_of_jobs_are_one_small_message_in_five_seconds() -> None:
    messages: list[dict[str, Any]] = []
    worker_table = WorkerTable()
    group = WorkerGroup("default", GroupPlan(SPEC, 30.0, Target()), "workers", Target())
    progress = Progress(worker_table, {"default": group}, ReportPlan(5.0, 50, picture=False), messages.append)
    job_ids = [f"7.{index}" for index in range(5000)]
    worker_table.submitted_jobs(job_ids, "default", 100.0)
    now = 1000.0
    for second in range(60):
        for job_id in job_ids[80 * second : 80 * second + 80]:
            change = apply(worker_table.table, "EXECUTE", job_id, 100.0 + second, {"SlotName": "slot1@a"})
            assert change is not None
            worker_table.get(job_id).saw_change(change)
        answer = {"groups": {"default": {"queued": 7, "done": second, "spent": 0.5 * second}}, "unfinished": 9}
        progress.saw(answer, {"default": Supply()}, 100.0 + second)
        progress.tell(now + second)
    assert len(messages) == 12
    assert all(message["kind"] == "progress" and len(message["jobs"]) == 50 for message in messages)
    assert messages[-1]["tasks"] == {"done": 55, "known": 64}
    assert sum(messages[-1]["states"].values()) == 5000


def test_what_has_not_changed_is_not_told_again() -> None:
    messages: list[dict[str, Any]] = []
    worker_table = WorkerTable()
    group = WorkerGroup("default", GroupPlan(SPEC, 30.0, Target()), "workers", Target())
    progress = Progress(worker_table, {"default": group}, ReportPlan(5.0, 50, picture=False), messages.append)
    for second in range(30):
        progress.saw(None, {"default": Supply()}, float(second))
        progress.tell(float(second))
    assert len(messages) == 1
