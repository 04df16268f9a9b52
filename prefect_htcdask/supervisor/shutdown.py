"""What the supervisor does when it is over: remove the jobs, stop the gateway cluster, delete the secrets."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from prefect_htcdask.condor.schedd import ScheddError
from prefect_htcdask.supervisor.loop import SUPERSEDED, Supervisor

logger = logging.getLogger(__name__)

_SETTLE_TIME = 3.0
_GONE_TIMEOUT = 60.0
_FIRST_PAUSE = 0.1
_LOG_PATIENCE = 2.0
_REMOVED = 3  # JobStatus


async def insist(deadline: float, attempt: Callable[[], Awaitable[bool]]) -> bool:
    """Try until it works, with growing pauses, until `deadline` (monotonic seconds); returns whether it did."""
    pause = 0.5
    while not await attempt():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(pause)
        pause = min(pause * 2, 15.0)
    return True


async def remove_jobs(supervisor: Supervisor) -> bool:
    """Have the schedd remove all jobs; returns whether it took the request.

    A schedd that stays away is asked until the jobs' lease has run out: then it removes them by itself when it is back.
    """

    async def attempt() -> bool:
        reason = f"prefect_htcdask: {supervisor.ended_because}"
        try:
            count = await supervisor.condor(supervisor.schedd.remove, supervisor.constraint, reason)
        except ScheddError as exc:
            supervisor.notifier.tell_once("warning", f"{exc}; asking again until the lease ends")
            return False
        logger.info("asked the schedd to remove %d jobs", count)
        return True

    supervisor.worker_table.mark_leaving(record.job_id for record in supervisor.worker_table.queued_jobs())
    return await insist(time.monotonic() + supervisor.plan.lease, attempt)


async def wait_until_gone(supervisor: Supervisor, timeout: float) -> bool:
    """Wait until no job is in the queue, for `timeout` seconds at most; returns whether that is so."""
    deadline = time.monotonic() + timeout
    pause = _FIRST_PAUSE
    ask_at = time.monotonic() + _LOG_PATIENCE
    while time.monotonic() < deadline:
        try:
            await supervisor.read_jobs()
            # A log costs the schedd nothing; the queue is asked where the log tells of no job, where there is none, and
            # now and then, should it have fallen silent. The queue has the last word: a job may have been submitted
            # that the log has not told of.
            told = supervisor.schedd.address.is_local and supervisor.worker_table.queued_jobs()
            if not told or time.monotonic() >= ask_at:
                ask_at = time.monotonic() + _LOG_PATIENCE
                left = await supervisor.condor(supervisor.schedd.query, supervisor.constraint, ["JobStatus"], 1)
                if not left:
                    supervisor.hurry()
                    await supervisor.read_jobs()
                    return True
                if left[0]["JobStatus"] != _REMOVED:
                    await supervisor.condor(supervisor.schedd.remove, supervisor.constraint, "prefect_htcdask: closed")
        except ScheddError as exc:
            logger.info("%s", exc)
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, 1.0)
    return False


class Cleanup:
    """What is done when the supervisor is over, in two parts: what the flow waits for, and the rest.

    Attributes:
        found: jobs that were in the queue at its beginning.
        problems: what was in the way, in words, once it is done.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self.owns_jobs = supervisor.ended_because != SUPERSEDED
        self.found = 0
        self.problems: list[str] = []
        self._stopping: asyncio.Task[bool] | None = None

    async def close(self) -> dict[str, Any]:
        """Have jobs and cluster go, give them a moment for it, and return the summary."""
        supervisor = self.supervisor
        self.found = len(supervisor.worker_table.queued_jobs())
        await supervisor.last_look()
        if supervisor.stop_cluster:
            # A gateway that stays away is asked until the scheduler ends by itself.
            deadline = time.monotonic() + supervisor.plan.scheduler_lease
            self._stopping = asyncio.ensure_future(insist(deadline, supervisor.gateway.stop))
        if self.owns_jobs and await remove_jobs(supervisor):
            await wait_until_gone(supervisor, _SETTLE_TIME)
        if self._stopping is not None:
            await asyncio.wait([self._stopping], timeout=_SETTLE_TIME)
        return {**supervisor.worker_table.summary(time.time()), **supervisor.progress.report(supervisor.ended_because)}

    async def finish(self) -> None:
        """Wait for the last job, delete what the jobs took with them, and let go of everything."""
        supervisor = self.supervisor
        if self.owns_jobs:
            patience = 2 * max(group.spec.vacate_time for group in supervisor.groups.values())
            if not await wait_until_gone(supervisor, patience):
                await self._forget_stuck_jobs()
            if not await wait_until_gone(supervisor, _GONE_TIMEOUT):
                left = len(supervisor.worker_table.queued_jobs())
                self._failed(f"{left} jobs are still in the queue; the lease is on them")
            supervisor.directory.clear_staging()
        if self._stopping is not None and not await self._stopping:
            self._failed("the gateway did not take the request to stop the cluster; the scheduler's lease ends it")
        await supervisor.scheduler.close()
        supervisor.schedd.close()

    def _failed(self, problem: str) -> None:
        logger.error("%s", problem)
        self.problems.append(problem)

    async def _forget_stuck_jobs(self) -> None:
        """Take those out of the queue whose host is lost.

        Their shadows look for the host as long as `job_lease_duration` says, removed or not; the host ends its part
        after the same time.
        """
        supervisor = self.supervisor
        constraint = f"{supervisor.constraint} && JobStatus == {_REMOVED}"
        try:
            count = await supervisor.condor(supervisor.schedd.forget, constraint, "prefect_htcdask: its host is lost")
        except ScheddError as exc:
            logger.warning("%s", exc)
        else:
            logger.warning("%d jobs did not go when removed, and were taken out of the queue", count)
