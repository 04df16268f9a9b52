"""When the supervisor asks why workers do not come, and what it says of that.

How HTCondor is asked is tried on the real pool (test_bad_input, test_idle_jobs); here its answer stands still, for half
an hour goes by.
"""

from __future__ import annotations

import asyncio
from typing import Any

from prefect_htcdask.condor.diagnosis import Category, Diagnosis
from prefect_htcdask.condor.job_events import apply
from prefect_htcdask.condor.schedd import ScheddError
from prefect_htcdask.condor.submit_description import WorkerSpec
from prefect_htcdask.supervisor.pending_jobs import PendingJobsDiagnoser
from prefect_htcdask.supervisor.policy import Target
from prefect_htcdask.supervisor.protocol import GroupPlan
from prefect_htcdask.supervisor.worker_group import WorkerGroup
from prefect_htcdask.supervisor.worker_table import WorkerTable

FULL = Diagnosis(Category.POOL_FULL, "the pool is full", "wait")
LARGE = Diagnosis(Category.NO_SLOT_LARGE_ENOUGH, "0 of 2 slots have 64 GiB", "lower it")


class Asked:
    """Stands for HTCondor: gives an answer, and notes each question."""

    def __init__(self) -> None:
        self.answer: Diagnosis | Exception | None = FULL
        self.questions: list[tuple[str, int, str]] = []

    def explain(self, constraint: str, waiting: int, settings: str) -> Diagnosis | None:
        self.questions.append((constraint, waiting, settings))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Cluster:
    """A cluster of one group, `gpu`, whose jobs were submitted at 100 s."""

    def __init__(self, *jobs: str) -> None:
        wanted = Target(fixed=2)
        self.group = WorkerGroup("gpu", GroupPlan(WorkerSpec(), start_timeout=0.0, target=wanted), "gpu", wanted)
        self.worker_table = WorkerTable(("cpu", "gpu"))
        self.worker_table.submitted_jobs(jobs, "gpu", 100.0)
        self.asked = Asked()
        self.messages: list[dict[str, Any]] = []

        async def condor(function: Any, *arguments: Any) -> Any:
            return function(*arguments)

        idle_jobs: Any = self.asked
        self.waiting = PendingJobsDiagnoser("c1", self.worker_table, idle_jobs, condor, self.messages.append)

    def look(self, *times: float) -> None:
        for now in times:
            asyncio.run(self.waiting.look(self.group, now))

    def event(self, event: str, job: str, when: float) -> None:
        apply(self.worker_table.table, event, job, when, {"SlotName": "slot1@a"})


def test_it_asks_seldom_and_tells_what_is_new() -> None:
    cluster = Cluster("1.0", "1.1")
    cluster.look(*range(100, 160, 10))
    assert cluster.asked.questions == [], "jobs may wait for a cycle"
    cluster.look(160.0, 161.0)
    constraint = 'HTCDaskClusterName == "c1" && HTCDaskWorkerGroup == "gpu"'
    assert cluster.asked.questions == [(constraint, 2, "workers.gpu")]
    assert cluster.messages == [
        {
            "kind": "waiting",
            "level": "info",
            "text": "the pool is full (wait)",
            "group": "gpu",
            "category": "pool_full",
            "summary": "the pool is full",
            "remedy": "wait",
        }
    ]
    cluster.look(*range(170, 3600, 10))
    assert len(cluster.asked.questions) == 4, "after one minute, 2, 7 and 32"
    assert len(cluster.messages) == 1, "nothing new"
    cluster.asked.answer = LARGE
    cluster.look(*range(3600, 7200, 10))
    assert [message["category"] for message in cluster.messages] == ["pool_full", "no_slot_large_enough"]
    assert cluster.messages[-1]["level"] == "warning"


def test_a_job_that_starts_ends_the_wait() -> None:
    cluster = Cluster("1.0", "1.1")
    cluster.look(160.0)
    cluster.event("EXECUTE", "1.0", 170.0)
    cluster.look(171.0, 200.0, 229.0)
    assert len(cluster.asked.questions) == 1
    cluster.worker_table.saw_workers(["htcdask-1.0-1"])
    cluster.look(231.0)
    assert len(cluster.asked.questions) == 2 and len(cluster.messages) == 2, "the other one waits on"


def test_jobs_that_were_told_to_go_are_not_waited_for() -> None:
    cluster = Cluster("1.0")
    cluster.worker_table.mark_leaving(["1.0"])
    cluster.look(1000.0)
    assert cluster.asked.questions == []


def test_workers_that_run_and_do_not_join() -> None:
    cluster = Cluster("1.0")
    cluster.event("EXECUTE", "1.0", 110.0)
    cluster.look(200.0, 229.0)
    assert cluster.messages == []
    cluster.look(230.0)
    assert [message["category"] for message in cluster.messages] == ["never_joined"]
    assert cluster.asked.questions == [], "HTCondor has done its part"


def test_an_htcondor_that_does_not_answer_is_asked_later() -> None:
    cluster = Cluster("1.0")
    cluster.asked.answer = ScheddError("the collector could not be asked")
    cluster.look(160.0)
    assert cluster.messages == []
    assert asyncio.run(cluster.waiting.why(cluster.group)) == "the collector could not be asked"
    cluster.asked.answer = None
    assert "none of its jobs waits" in asyncio.run(cluster.waiting.why(cluster.group))
    cluster.asked.answer = LARGE
    cluster.look(161.0, 220.0)
    assert len(cluster.messages) == 1
