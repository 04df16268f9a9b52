"""Tells why workers do not come: jobs that wait in the queue, and jobs that run without their worker joining."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from prefect_htcdask.condor.analyze import IdleJobs
from prefect_htcdask.condor.diagnosis import Category, Diagnosis, diagnose_never_joined
from prefect_htcdask.condor.job_codes import JobState
from prefect_htcdask.condor.job_events import JobRecord
from prefect_htcdask.condor.schedd import ScheddError
from prefect_htcdask.condor.submit_description import group_constraint
from prefect_htcdask.supervisor.worker_group import WorkerGroup
from prefect_htcdask.supervisor.worker_table import WorkerStatus, WorkerTable

FIRST_LOOK = 60.0
"""Seconds that jobs wait, or run without joining twice as long, before it is asked why."""

_LONGEST = 1800.0
"""Seconds between two looks at most, while they go on waiting."""

logger = logging.getLogger(__name__)


@dataclass
class _Schedule:
    """When to look next at the jobs of a group (Unix time), after what pause, and what was told of the last look."""

    at: float = 0.0
    pause: float = FIRST_LOOK
    told: Category | None = None


class PendingJobsDiagnoser:
    """Explains the jobs of a cluster whose workers do not come, seldom: each look asks schedd and collector.

    Args:
        cluster: digest of the gateway cluster's name (`cluster_digest`).
        worker_table: jobs and workers.
        idle_jobs: asks HTCondor.
        condor: calls a function in the bindings' own thread.
        say: sends a message to the flow's process.
    """

    def __init__(
        self,
        cluster: str,
        worker_table: WorkerTable,
        idle_jobs: IdleJobs,
        condor: Callable[..., Awaitable[Any]],
        say: Callable[[dict[str, Any]], None],
    ) -> None:
        self._cluster = cluster
        self._worker_table = worker_table
        self._idle_jobs = idle_jobs
        self._condor = condor
        self._say = say
        self._looks: dict[str, _Schedule] = {}

    async def look(self, group: WorkerGroup, now: float) -> None:
        """Tell why workers of a group do not come, where they have not for a while and the reason is a new one.

        Args:
            group: the group.
            now: Unix time in seconds.
        """
        looks = self._looks.setdefault(group.name, _Schedule())
        if not self._is_late(group, now):
            self._looks[group.name] = _Schedule()
            return
        if now < looks.at:
            return
        looks.at, looks.pause = now + looks.pause, min(5 * looks.pause, _LONGEST)
        try:
            diagnosis = await self.explain(group)
        except ScheddError as exc:
            logger.info("%s", exc)
            return
        if diagnosis is None or diagnosis.category is looks.told:
            return
        looks.told = diagnosis.category
        self._say(
            {
                "kind": "waiting",
                "level": diagnosis.level,
                "text": str(diagnosis),
                "group": group.name,
                "category": diagnosis.category.value,
                "summary": diagnosis.summary,
                "remedy": diagnosis.remedy,
            }
        )

    async def why(self, group: WorkerGroup) -> str:
        """Why workers of a group do not come, in words, as far as the pool tells."""
        try:
            return str(await self.explain(group) or "none of its jobs waits in the queue")
        except ScheddError as exc:
            return str(exc)

    async def explain(self, group: WorkerGroup) -> Diagnosis | None:
        """Why workers of a group do not come; `None` where no job is there to be asked about.

        Raises:
            ScheddError: schedd or collector cannot be asked.
        """
        idle, running = self._absent(group)
        if running:
            return diagnose_never_joined(len(running))
        constraint = group_constraint(self._cluster, group.name)
        found: Diagnosis | None = await self._condor(self._idle_jobs.explain, constraint, len(idle), group.settings)
        return found

    def _absent(self, group: WorkerGroup) -> tuple[list[JobRecord], list[JobRecord]]:
        """The group's idle jobs, and those that run without their worker having joined."""
        absent = [
            worker.job
            for worker in self._worker_table.workers(group.name)
            if worker.status is WorkerStatus.PENDING and not worker.is_leaving
        ]
        idle = [record for record in absent if record.state is JobState.IDLE]
        running = [record for record in absent if record.state is JobState.RUNNING]
        return idle, running

    def _is_late(self, group: WorkerGroup, now: float) -> bool:
        """Whether the group's jobs have waited for long, and none has started since."""
        idle, running = self._absent(group)
        waits = min((record.submitted or now for record in idle), default=now)
        runs = min((record.started or now for record in running), default=now)
        if now - waits < FIRST_LOOK and now - runs < 2 * FIRST_LOOK:
            return False
        records = self._worker_table.table.records.values()
        starts = (record.last_start or 0.0 for record in records if self._worker_table.group_of(record) == group.name)
        return now - max(min(waits, runs), *starts) >= FIRST_LOOK
