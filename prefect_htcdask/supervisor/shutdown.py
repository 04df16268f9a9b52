"""What the supervisor does when it is over: remove the jobs, stop the gateway cluster, delete the secrets."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from prefect_htcdask.condor.job_codes import JobStatus
from prefect_htcdask.condor.schedd import ScheddError
from prefect_htcdask.condor.staging import RunDirectory
from prefect_htcdask.supervisor.cluster_jobs import ClusterJobs
from prefect_htcdask.supervisor.notifier import Notifier
from prefect_htcdask.supervisor.protocol import SupervisorConfig
from prefect_htcdask.supervisor.rpc import GatewayLink, SchedulerLink
from prefect_htcdask.supervisor.worker_table import WorkerTable

logger = logging.getLogger(__name__)

SETTLE_TIME = 3.0
"""Seconds for jobs and gateway cluster to go, for which the flow waits."""

GONE_TIMEOUT = 60.0
"""Seconds for jobs that were removed to leave the queue, for which nobody waits."""

_FIRST_PAUSE = 0.1
LOG_PATIENCE = 2.0
"""Seconds without a word of the job event log, until the schedd is asked."""


async def insist(deadline: float, attempt: Callable[[], Awaitable[bool]]) -> bool:
    """Try until it works, with growing pauses, until `deadline` (monotonic seconds); returns whether it did."""
    pause = 0.5
    while not await attempt():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(pause)
        pause = min(pause * 2, 15.0)
    return True


@dataclass
class Shutdown:
    """What is done when the supervisor is over, in two parts: what the flow waits for, and the rest.

    Attributes:
        plan: what the flow's process handed over.
        jobs: the cluster's jobs at the schedd.
        read_jobs: has the worker table take in what happened to them; given true, of the queue too, however short ago.
        worker_table: what is known of them.
        scheduler: the connection to the cluster's scheduler.
        gateway: that to its gateway.
        directory: has the files that the jobs took with them.
        notifier: tells the flow's process.
        ended_because: why it is over.
        owns_jobs: whether the jobs are still this supervisor's.
        stop_cluster: whether the gateway cluster is to stop.
        settle_time: seconds for jobs and gateway cluster to go, for which the flow waits.
        gone_timeout: seconds for jobs that were removed to leave the queue, for which nobody waits.
        log_patience: seconds without a word of the job event log, until the schedd is asked.
        found: jobs that were in the queue at its beginning.
        problems: what was in the way, in words, once it is done.
    """

    plan: SupervisorConfig
    jobs: ClusterJobs
    read_jobs: Callable[[bool], Awaitable[None]]
    worker_table: WorkerTable
    scheduler: SchedulerLink
    gateway: GatewayLink
    directory: RunDirectory
    notifier: Notifier
    ended_because: str
    owns_jobs: bool
    stop_cluster: bool
    settle_time: float = SETTLE_TIME
    gone_timeout: float = GONE_TIMEOUT
    log_patience: float = LOG_PATIENCE
    found: int = 0
    problems: list[str] = field(default_factory=list)
    _stopping: asyncio.Task[bool] | None = None

    async def close(self) -> None:
        """Have jobs and cluster go, and give them a moment for it."""
        self.found = len(self.worker_table.queued_jobs())
        if self.stop_cluster:
            # A gateway that stays away is asked until the scheduler ends by itself.
            deadline = time.monotonic() + self.plan.scheduler_lease
            self._stopping = asyncio.ensure_future(insist(deadline, self.gateway.stop))
        if self.owns_jobs and await self._remove_jobs():
            await self._wait_until_gone(self.settle_time)
        if self._stopping is not None:
            await asyncio.wait([self._stopping], timeout=self.settle_time)

    async def finish(self) -> None:
        """Wait for the last job, delete what the jobs took with them, and let go of everything."""
        if self.owns_jobs:
            patience = 2 * max(group.spec.vacate_time for group in self.plan.groups.values())
            if not await self._wait_until_gone(patience):
                await self._forget_stuck_jobs()
            if not await self._wait_until_gone(self.gone_timeout):
                left = len(self.worker_table.queued_jobs())
                self._failed(f"{left} jobs are still in the queue; the lease is on them")
            self.directory.clear_staging()
        if self._stopping is not None and not await self._stopping:
            self._failed("the gateway did not take the request to stop the cluster; the scheduler's lease ends it")
        await self.scheduler.close()
        self.jobs.schedd.close()

    async def _remove_jobs(self) -> bool:
        """Have the schedd remove all jobs; returns whether it took the request.

        A schedd that stays away is asked until the jobs' lease has run out: then it removes them by itself when it is
        back.
        """

        async def attempt() -> bool:
            try:
                count = await self.jobs.remove(f"prefect_htcdask: {self.ended_because}")
            except ScheddError as exc:
                self.notifier.tell_once("warning", f"{exc}; asking again until the lease ends")
                return False
            logger.info("asked the schedd to remove %d jobs", count)
            return True

        self.worker_table.mark_leaving(record.job_id for record in self.worker_table.queued_jobs())
        return await insist(time.monotonic() + self.plan.lease, attempt)

    async def _wait_until_gone(self, timeout: float) -> bool:
        """Wait until no job is in the queue, for `timeout` seconds at most; returns whether that is so."""
        deadline = time.monotonic() + timeout
        pause = _FIRST_PAUSE
        ask_at = time.monotonic() + self.log_patience
        while time.monotonic() < deadline:
            try:
                await self.read_jobs(False)
                # A log costs the schedd nothing; the queue is asked where the log tells of no job, where there is none,
                # and now and then, should it have fallen silent. The queue has the last word: a job may have been
                # submitted that the log has not told of.
                told = self.jobs.schedd.address.is_local and self.worker_table.queued_jobs()
                if not told or time.monotonic() >= ask_at:
                    ask_at = time.monotonic() + self.log_patience
                    left = await self.jobs.any_left()
                    if left is None:
                        await self.read_jobs(True)
                        return True
                    if left != JobStatus.REMOVED:
                        await self.jobs.remove("prefect_htcdask: closed")
            except ScheddError as exc:
                logger.info("%s", exc)
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 1.0)
        return False

    async def _forget_stuck_jobs(self) -> None:
        """Take those out of the queue whose host is lost.

        Their shadows look for the host as long as `job_lease_duration` says, removed or not; the host ends its part
        after the same time.
        """
        try:
            count = await self.jobs.forget("prefect_htcdask: its host is lost")
        except ScheddError as exc:
            logger.warning("%s", exc)
        else:
            logger.warning("%d jobs did not go when removed, and were taken out of the queue", count)

    def _failed(self, problem: str) -> None:
        logger.error("%s", problem)
        self.problems.append(problem)
