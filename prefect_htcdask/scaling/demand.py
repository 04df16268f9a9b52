"""The plugin on the Dask scheduler: counts demand, keeps foreign hands off our workers, and holds the cluster's lease.

It travels by value (cloudpickle), so the scheduler's image needs nothing of ours: this module may import only what
every scheduler has, and nothing of this package.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from distributed.diagnostics.plugin import SchedulerPlugin

PLUGIN_NAME = "htcdask"
WORKER_PREFIX = "htcdask-"

logger = logging.getLogger("distributed.scheduler")


class DemandPlugin(SchedulerPlugin):
    """Answers the supervisor's question for demand, and grants it the cluster for a time.

    Args:
        lease: seconds that the cluster lives without a supervisor's renewal; 0: for ever.
    """

    name = PLUGIN_NAME

    def __init__(self, lease: float) -> None:
        self.lease = lease
        self.owner: str | None = None
        self.epoch = 0
        self.expires = 0.0
        self.request: dict[str, Any] | None = None
        self.request_number = 0
        self.idle_since: dict[str, float] = {}
        self.scheduler: Any = None
        self.task: Any = None

    async def start(self, scheduler: Any) -> None:
        """Take the place of the gateway's idle check, which does not see queued tasks, and watch the lease."""
        self.scheduler = scheduler
        self.expires = time.monotonic() + self.lease
        scheduler.handlers["htcdask_demand"] = self.demand
        scheduler.handlers["htcdask_claim"] = self.claim
        scheduler.handlers["htcdask_scale"] = self.scale
        scheduler.handlers["htcdask_retire"] = self.retire
        gateway = scheduler.services.get("gateway")
        check = getattr(gateway, "check_idle_task", None)
        if check is not None:
            check.cancel()
        self.task = asyncio.ensure_future(self.watch(getattr(gateway, "idle_timeout", 0) or 0))

    async def close(self) -> None:
        """Stop watching."""
        if self.task is not None:
            self.task.cancel()

    # What the supervisor calls. Handlers of a scheduler get no more than what the caller names.

    async def claim(self, owner: str, force: bool = False) -> dict[str, Any]:
        """Grant the cluster to one supervisor; another that holds a live lease keeps it unless `force`.

        Returns:
            `granted`, and the `owner` and `epoch` that hold now.
        """
        now = time.monotonic()
        alive = self.owner is not None and now < self.expires
        if alive and self.owner != owner and not force:
            return {"granted": False, "owner": self.owner, "epoch": self.epoch}
        if self.owner != owner:
            self.owner, self.epoch = owner, self.epoch + 1
        self.expires = now + self.lease
        return {"granted": True, "owner": owner, "epoch": self.epoch}

    async def demand(self, owner: str, epoch: int) -> dict[str, Any]:
        """Tasks that want a thread, and renew the lease of the owner that asks."""
        if owner != self.owner or epoch != self.epoch:
            return {"status": "superseded", "owner": self.owner, "epoch": self.epoch}
        self.expires = time.monotonic() + self.lease
        scheduler = self.scheduler
        now = time.monotonic()
        in_hand, joined = {}, []
        for ws in scheduler.workers.values():
            name = str(ws.name)
            if not name.startswith(WORKER_PREFIX):
                continue
            joined.append(name)
            if ws.processing:
                in_hand[name] = len(ws.processing)
                self.idle_since.pop(name, None)
            else:
                self.idle_since.setdefault(name, now)
        self.idle_since = {name: since for name, since in self.idle_since.items() if name in set(joined)}
        return {
            "status": "ok",
            "queued": len(scheduler.queued) + len(scheduler.unrunnable),
            "in_hand": in_hand,
            "joined": joined,
            "idle": {name: now - since for name, since in self.idle_since.items()},
            "clients": sum(1 for key in scheduler.clients if key != "fire-and-forget"),
            "request": self.request,
        }

    async def scale(self, request: dict[str, Any]) -> dict[str, Any]:
        """Leave a wish for the owner: another process that connected to this cluster may scale it."""
        self.request_number += 1
        self.request = {**request, "number": self.request_number}
        alive = self.owner is not None and time.monotonic() < self.expires
        return {"owner": self.owner if alive else None, "number": self.request_number}

    async def retire(self, names: list[str], idle_only: bool = False) -> list[str]:
        """Move results off workers, then close them; returns the names of those that went.

        Args:
            names: the workers.
            idle_only: leave those alone that got a task since they were chosen. Else a busy worker's tasks go back to
                the queue, without being marked suspicious.
        """
        workers = {str(ws.name): ws for ws in self.scheduler.workers.values()}
        known = [name for name in names if name in workers and not (idle_only and workers[name].processing)]
        retired = await self.scheduler.retire_workers(
            names=known, remove=True, close_workers=True, stimulus_id=f"htcdask-retire-{time.time()}"
        )
        return [str(info.get("name")) for info in retired.values()]

    # What the scheduler calls.

    def valid_workers_downscaling(self, scheduler: Any, workers: list[Any]) -> list[Any]:
        """The gateway's service closes what exceeds its own count, which is none: ours are not its to close."""
        return [ws for ws in workers if not str(ws.name).startswith(WORKER_PREFIX)]

    async def watch(self, idle_timeout: float) -> None:
        """End the cluster when its lease ran out, or when it was idle for the time that the gateway sets."""
        last_transition: Any = None
        idle_from = time.monotonic()
        while True:
            periods = [value for value in (self.lease, idle_timeout) if value > 0]
            await asyncio.sleep(min([15.0, *(value / 4 for value in periods)]))
            now = time.monotonic()
            log = self.scheduler.transition_log
            newest = log[-1] if log else None
            waiting = self.scheduler.queued or self.scheduler.unrunnable
            if waiting or newest is not last_transition or any(ws.processing for ws in self.scheduler.workers.values()):
                last_transition, idle_from = newest, now
            if self.lease and now > self.expires:
                await self.end(f"no supervisor has renewed the lease of {self.lease:.0f} s")
            elif idle_timeout and now - idle_from > idle_timeout:
                await self.end(f"it has been idle for {idle_timeout:.0f} s")

    async def end(self, why: str) -> None:
        """Ask the gateway to stop this cluster."""
        logger.warning("htcdask: this cluster ends: %s", why)
        gateway = self.scheduler.services.get("gateway")
        try:
            if gateway is not None:
                await gateway.gateway.shutdown()
            else:
                await self.scheduler.close(reason=f"htcdask: {why}")
        except Exception:
            # The gateway may be restarting; the next round asks again.
            logger.warning("htcdask: the gateway could not be asked to stop this cluster", exc_info=True)
