"""The end of a supervisor, on stand-ins for schedd and gateway: jobs that stay, a schedd that is away."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prefect_htcdask.condor.address import ScheddAddress
from prefect_htcdask.condor.job_codes import JobStatus
from prefect_htcdask.condor.schedd import ScheddError
from prefect_htcdask.supervisor.shutdown import Shutdown
from prefect_htcdask.supervisor.worker_table import WorkerTable

IDLE = 1


@dataclass
class Jobs:
    """What a schedd would do, job by job: how often it refuses, and what it takes to have a job go."""

    refusals: int = 0
    goes_when: str = "removed"
    left: int | None = IDLE
    done: list[str] = field(default_factory=list)
    schedd: Any = None

    def __post_init__(self) -> None:
        self.schedd = SimpleNamespace(address=ScheddAddress(), close=lambda: self.done.append("closed"))

    async def remove(self, reason: str) -> int:
        if self.refusals:
            self.refusals -= 1
            raise ScheddError("the schedd cannot be reached")
        self.done.append(reason)
        self.left = None if self.goes_when == "removed" else JobStatus.REMOVED
        return 1

    async def forget(self, reason: str) -> int:
        self.done.append(reason)
        self.left = None if self.goes_when == "forgotten" else self.left
        return 1

    async def any_left(self) -> int | None:
        return self.left


SHORT = {"settle_time": 0.3, "gone_timeout": 0.3, "log_patience": 0.05}


class Ends:
    """A shutdown with all that is told and done by it."""

    def __init__(self, jobs: Jobs, directory: Path, takes_stop: bool = True, **changed: Any) -> None:
        self.jobs = jobs
        self.told: list[str] = []
        self.looks: list[bool] = []
        worker_table = WorkerTable()
        worker_table.submitted_jobs(["1.0"], "default", 1.0)
        plan: Any = SimpleNamespace(
            lease=5.0, scheduler_lease=1.0, groups={"default": SimpleNamespace(spec=SimpleNamespace(vacate_time=0.1))}
        )

        async def stop() -> bool:
            jobs.done.append("stop")
            return takes_stop

        async def nothing() -> None:
            jobs.done.append("scheduler")

        async def read(at_once: bool) -> None:
            self.looks.append(at_once)
            if jobs.left is None:
                worker_table.table.records.clear()

        reading: Callable[[bool], Awaitable[None]] = read
        parts: dict[str, Any] = {
            "plan": plan,
            "jobs": jobs,
            "read_jobs": reading,
            "worker_table": worker_table,
            "scheduler": SimpleNamespace(close=nothing),
            "gateway": SimpleNamespace(stop=stop),
            "directory": SimpleNamespace(clear_staging=lambda: jobs.done.append("staging")),
            "notifier": SimpleNamespace(tell_once=lambda level, text: self.told.append(text)),
            "ended_because": "the cluster was closed",
            "owns_jobs": True,
            "stop_cluster": True,
        }
        self.shutdown = Shutdown(**{**parts, **SHORT, **changed})

    async def run(self) -> None:
        await self.shutdown.close()
        await self.shutdown.finish()


async def test_jobs_are_removed_the_cluster_stopped_and_secrets_deleted(tmp_path: Path) -> None:
    ends = Ends(Jobs(), tmp_path)
    await ends.run()
    assert set(ends.jobs.done[:2]) == {"stop", "prefect_htcdask: the cluster was closed"}
    assert ends.jobs.done[2:] == ["staging", "scheduler", "closed"]
    assert (ends.shutdown.found, ends.shutdown.problems) == (1, []) and ends.looks[-1]


async def test_a_schedd_that_is_away_is_asked_again(tmp_path: Path) -> None:
    ends = Ends(Jobs(refusals=2), tmp_path)
    await ends.run()
    assert "prefect_htcdask: the cluster was closed" in ends.jobs.done and ends.shutdown.problems == []
    assert ends.told == ["the schedd cannot be reached; asking again until the lease ends"] * 2


async def test_a_job_whose_host_is_lost_is_taken_out_of_the_queue(tmp_path: Path) -> None:
    ends = Ends(Jobs(goes_when="forgotten"), tmp_path)
    await ends.run()
    assert "prefect_htcdask: its host is lost" in ends.jobs.done and ends.shutdown.problems == []


async def test_what_stays_for_all_that_is_told(tmp_path: Path) -> None:
    ends = Ends(Jobs(goes_when="never"), tmp_path, takes_stop=False)
    await ends.run()
    jobs, cluster = ends.shutdown.problems
    assert "1 jobs are still in the queue; the lease is on them" in jobs and "scheduler's lease ends it" in cluster
    assert ends.jobs.done[-3:] == ["staging", "scheduler", "closed"]


async def test_jobs_that_another_supervisor_took_over_stay(tmp_path: Path) -> None:
    ends = Ends(Jobs(), tmp_path, owns_jobs=False, stop_cluster=False)
    await ends.run()
    assert ends.jobs.done == ["scheduler", "closed"]
