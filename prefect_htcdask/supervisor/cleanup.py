"""What the supervisor does when it is over: remove the jobs, stop the gateway cluster, delete the secrets."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from ..condor.schedd import ScheddError
from .loop import Supervisor

logger = logging.getLogger(__name__)

_SETTLE_TIME = 3.0
_GONE_TIMEOUT = 60.0
_FIRST_PAUSE = 0.1


async def ask_for_removal(supervisor: Supervisor) -> None:
    """Have the schedd remove all jobs, and the gateway stop the cluster; both until they took the request.

    A schedd that stays away is asked until the jobs' lease has run out: then it removes them by itself when it is back.
    """
    deadline = time.monotonic() + supervisor.plan.lease
    stopped = not supervisor.stop_cluster
    removed = supervisor.ended_because == "superseded"
    supervisor.fleet.leaving.update(record.job_id for record in supervisor.fleet.queued_jobs())
    pause = 0.5
    while not (stopped and removed):
        if not removed:
            try:
                count = await supervisor.condor(
                    supervisor.schedd.remove,
                    supervisor.constraint,
                    f"prefect_htcdask: {supervisor.ended_because}",
                )
                logger.info("asked the schedd to remove %d jobs", count)
                removed = True
            except ScheddError as exc:
                supervisor.tell_once("warning", f"{exc}; asking again until the lease ends")
        if not stopped:
            stopped = await supervisor.gateway.stop()
        if time.monotonic() > deadline:
            logger.error(
                "gave up: jobs removed: %s, gateway cluster stopped: %s; the leases do the rest",
                removed,
                stopped,
            )
            return
        if not (stopped and removed):
            await asyncio.sleep(pause)
            pause = min(pause * 2, 15.0)


async def wait_until_gone(supervisor: Supervisor, timeout: float) -> bool:
    """Wait until no job is in the queue, for `timeout` seconds at most; returns whether that is so."""
    deadline = time.monotonic() + timeout
    pause = _FIRST_PAUSE
    while time.monotonic() < deadline:
        try:
            await supervisor.read_jobs()
            if not supervisor.fleet.queued_jobs():
                # The queue has the last word: a job may have been submitted that the log has not told of.
                if not await supervisor.condor(supervisor.schedd.query, supervisor.constraint, ["ClusterId"], 1):
                    return True
                await supervisor.condor(supervisor.schedd.remove, supervisor.constraint, "prefect_htcdask: closed")
        except ScheddError as exc:
            logger.info("%s", exc)
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, 1.0)
    return False


async def close(supervisor: Supervisor) -> dict[str, Any]:
    """Ask for removal, give the jobs a moment to go, and return the summary."""
    await ask_for_removal(supervisor)
    if supervisor.ended_because != "superseded":
        await wait_until_gone(supervisor, _SETTLE_TIME)
    return supervisor.fleet.summary(time.time())


async def finish(supervisor: Supervisor) -> None:
    """Wait for the last job, delete what the jobs took with them, and let go of everything."""
    if supervisor.ended_because != "superseded" and not await wait_until_gone(supervisor, _GONE_TIMEOUT):
        logger.error("%d jobs are still in the queue; their lease removes them", len(supervisor.fleet.queued_jobs()))
    supervisor.directory.clear_staging()
    await supervisor.scheduler.close()
    supervisor.schedd.close()
