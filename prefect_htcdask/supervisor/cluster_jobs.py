"""A cluster's worker jobs at the schedd, all at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prefect_htcdask.condor.job_codes import JobStatus
from prefect_htcdask.condor.schedd import ScheddClient


class ClusterJobs:
    """Asks the schedd for what concerns all jobs of a cluster.

    Args:
        schedd: the schedd, already checked.
        constraint: names the cluster's jobs; the client adds their owner.
    """

    def __init__(self, schedd: ScheddClient, constraint: str) -> None:
        self.schedd = schedd
        self.constraint = constraint
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="condor")

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call the bindings in their own thread: they are not thread-safe among themselves.

        Raises:
            ScheddError: as the function does.
        """
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    async def renew(self, lease: float) -> None:
        """Have the jobs' lease end in so many seconds.

        Raises:
            ScheddError: the schedd did not take it.
        """
        await self.call(self.schedd.renew, self.constraint, lease)

    async def remove(self, reason: str) -> int:
        """Have all jobs removed; returns how many there were.

        Raises:
            ScheddError: the schedd did not take it.
        """
        count: int = await self.call(self.schedd.remove, self.constraint, reason)
        return count

    async def forget(self, reason: str) -> int:
        """Take those out of the queue that are being removed and do not go; returns how many there were.

        Raises:
            ScheddError: the schedd did not take it.
        """
        constraint = f"{self.constraint} && JobStatus == {JobStatus.REMOVED.value}"
        count: int = await self.call(self.schedd.forget, constraint, reason)
        return count

    async def any_left(self) -> int | None:
        """The JobStatus of one of the jobs in the queue; `None` where there is none.

        Raises:
            ScheddError: the schedd does not answer.
        """
        ads = await self.call(self.schedd.query, self.constraint, ["JobStatus"], 1)
        return int(ads[0]["JobStatus"]) if ads else None
