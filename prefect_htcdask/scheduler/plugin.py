"""The plugin on the Dask scheduler: counts demand, keeps foreign hands off our workers, and holds the cluster's lease.

It travels by value (cloudpickle), so the scheduler's image needs nothing of ours: of this package it may import only
what travels with it, `BY_VALUE_MODULES`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from distributed.comm.core import CommClosedError
from distributed.core import Status
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.metrics import time as wall_time
from distributed.scheduler import heartbeat_interval

from prefect_htcdask.scheduler.demand import DemandCounter
from prefect_htcdask.scheduler.heartbeats import INTERVAL, WORKER_TTL, Heartbeats
from prefect_htcdask.scheduler.stealing import rebalance

PLUGIN_NAME = "htcdask"
WORKER_PREFIX = "htcdask-"

BY_VALUE_MODULES = tuple(
    f"{__package__}.{name}" for name in ("plugin", "demand", "task_kinds", "worker_groups", "heartbeats", "stealing")
)
"""Modules whose functions and classes are to be pickled by value with the plugin."""

SPREAD_INTERVAL = 0.25
"""Seconds between two looks at piles of tasks."""

DRAIN = "htcdask-drain"
QUIET = "htcdask-quiet"
"""A message of this name on the stream to a worker has it finish what it runs, and leave (`graceful_shutdown`)."""

LEAVING = (Status.closing_gracefully, Status.closing)

logger = logging.getLogger("distributed.scheduler")


class DemandPlugin(SchedulerPlugin):
    """Answers the supervisor's question for demand, and grants it the cluster for a time.

    Args:
        lease: seconds without a renewal for which the cluster stays its owner's; 0: it is any supervisor's to take.
        offers: the Dask resources that one worker of each group offers, in the order of the groups; `None`: one group
            "default", which all tasks belong to.
        scheduler_lease: seconds without a renewal after which the cluster ends, `lease` by default; 0: never. The owner
            of one that lived on longer than its workers finds its tasks there when it awakes.
    """

    name = PLUGIN_NAME

    def __init__(
        self,
        lease: float,
        offers: Mapping[str, Mapping[str, float]] | None = None,
        scheduler_lease: float | None = None,
    ) -> None:
        self.lease = lease
        self.scheduler_lease = lease if scheduler_lease is None else scheduler_lease
        self.offers = offers
        self.owner: str | None = None
        self.epoch = 0
        self.expires = self.ends = 0.0
        self.request_number = 0
        self.requests: dict[str | None, dict[str, Any]] = {}
        self.scheduler: Any = None
        self.counter: Any = None
        self.transition: Any = None
        self.task: Any = None
        self.spreading: Any = None
        self.listening: Any = None

    async def start(self, scheduler: Any) -> None:
        """Take the place of the gateway's idle check, which does not see queued tasks, and watch the lease.

        An earlier plugin of ours on this scheduler hands over its owner and the wishes left with it.
        """
        self.scheduler = scheduler
        self.renew(time.monotonic())
        earlier = scheduler.plugins.get(PLUGIN_NAME)
        if earlier is not None:
            for attribute in ("owner", "epoch", "request_number", "requests"):
                setattr(self, attribute, getattr(earlier, attribute, getattr(self, attribute)))
            await earlier.close()
        scheduler.handlers["htcdask_demand"] = self.demand
        scheduler.handlers["htcdask_claim"] = self.claim
        scheduler.handlers["htcdask_scale"] = self.scale
        scheduler.handlers["htcdask_retire"] = self.retire
        scheduler.handlers["htcdask_alive"] = self.alive
        scheduler.handlers["htcdask_quiet"] = self.quiet
        gateway = scheduler.services.get("gateway")
        check = getattr(gateway, "check_idle_task", None)
        if check is not None:
            check.cancel()
        self.task = asyncio.ensure_future(self.watch(getattr(gateway, "idle_timeout", 0) or 0))
        self.spreading = asyncio.ensure_future(self.spread())
        self.listening = asyncio.ensure_future(self.listen())
        # Last, and with nothing awaited after it: every later transition is told to this plugin.
        self.count_by(self.offers)

    def count_by(self, offers: Mapping[str, Mapping[str, float]] | None) -> None:
        """Count the tasks by these groups from now on."""
        self.offers = offers
        self.counter = DemandCounter(self.scheduler, offers)
        # The scheduler calls it for every step of every task: without a call in between.
        self.transition = self.counter.transition

    def renew(self, now: float) -> None:
        """The owner lives: both leases begin anew."""
        self.expires, self.ends = now + self.lease, now + self.scheduler_lease

    async def close(self) -> None:
        """Stop watching, spreading and listening."""
        for task in (self.task, self.spreading, self.listening):
            if task is not None:
                task.cancel()

    # What the supervisor calls. Handlers of a scheduler get no more than what the caller names.

    async def claim(self, owner: str, offers: dict[str, dict[str, float]] | None = None) -> dict[str, Any]:
        """Grant the cluster to one supervisor; another that holds a live lease keeps it.

        Args:
            owner: who asks.
            offers: the groups that this owner has, where they may differ from those that the plugin came with.

        Returns:
            `granted`, and the `owner` and `epoch` that hold now.
        """
        now = time.monotonic()
        alive = self.owner is not None and now < self.expires
        if alive and self.owner != owner:
            return {"granted": False, "owner": self.owner, "epoch": self.epoch}
        if self.owner != owner:
            self.owner, self.epoch = owner, self.epoch + 1
        self.renew(now)
        if offers is not None and list(offers.items()) != list((self.offers or {}).items()):
            self.count_by(offers)
        return {"granted": True, "owner": owner, "epoch": self.epoch}

    async def demand(self, owner: str, epoch: int) -> dict[str, Any]:
        """Tasks that want a thread, and renew the leases for the owner that asks.

        Returns:
            a mapping whose size depends on the workers and groups, not on the tasks:
            - `groups`: for each, `queued` (ready tasks without a worker), `stacked` (tasks that a worker has beyond
              what it can run at once), `coming` (tasks whose missing inputs are all in hand, by seconds from now),
              `work` (expected seconds of what is queued and in hand), `unknown` (how many of these are of a kind of
              which none has ended), `task_seconds` (mean of a finished task), `done` (tasks that ended, well or with an
              error) and `spent` (seconds that these took);
            - `unfinished`: tasks that have not ended;
            - `unmatched`: ready tasks that no group can run, by what they ask for;
            - `durations`: mean seconds by task name, at most `task_kinds.MOST_NAMES`;
            - `in_hand`: for each busy worker its tasks that have or want a thread, at least 1;
            - `joined`: all workers; `idle`: for each without a task, since how many seconds; `holding`: those of the
              idle that hold results; `closing`: those that take no more tasks and leave;
            - `requests`: the last wish for each group, the oldest first.
        """
        if owner != self.owner or epoch != self.epoch:
            return {"status": "superseded", "owner": self.owner, "epoch": self.epoch}
        now = time.monotonic()
        self.renew(now)
        scheduler, counter = self.scheduler, self.counter
        counter.check()
        last_busy = counter.last_busy
        in_hand: dict[str, int] = {}
        idle: dict[str, float] = {}
        stacked: dict[str, int] = {}
        joined, holding, closing = [], [], []
        for address, ws in scheduler.workers.items():
            name = str(ws.name)
            if not name.startswith(WORKER_PREFIX):
                continue
            joined.append(name)
            if ws.processing:
                # A task that seceded holds no thread, but its worker.
                in_hand[name] = max(1, len(ws.processing) - len(ws.long_running))
                last_busy[address] = now
                counter.stacked_on(ws, stacked)
            else:
                idle[name] = now - last_busy.setdefault(address, now)
                if ws.has_what:
                    holding.append(name)
            if ws.status in LEAVING:
                closing.append(name)
        return {
            "status": "ok",
            "groups": counter.told(stacked, now),
            "unfinished": counter.unfinished(),
            "unmatched": counter.kinds.unserved(),
            "durations": counter.kinds.durations(),
            "in_hand": in_hand,
            "joined": joined,
            "idle": idle,
            "holding": holding,
            "closing": closing,
            "requests": sorted(self.requests.values(), key=lambda request: request["number"]),
        }

    async def scale(self, request: dict[str, Any]) -> dict[str, Any]:
        """Leave a wish for the owner: another process that connected to this cluster may scale it.

        A wish for a `group` stands beside those for others, and takes the place of an earlier one for the same.
        """
        self.request_number += 1
        group = request.get("group")
        self.requests[None if group is None else str(group)] = {**request, "number": self.request_number}
        alive = self.owner is not None and time.monotonic() < self.expires
        return {"owner": self.owner if alive else None, "number": self.request_number}

    async def alive(self, address: str) -> bool:
        """A worker lives, whose own process is too busy to say so; returns whether it is one of this scheduler's."""
        ws = self.scheduler.workers.get(address)
        if ws is not None:
            ws.last_seen = wall_time()
        return ws is not None

    async def retire(self, names: list[str], idle_only: bool = False) -> list[str]:
        """Have workers leave; returns the names of those that went, and of those that will when their tasks have ended.

        An idle worker is closed when its results have moved; where they find no other place, it stays and takes tasks
        again. A busy one takes no more tasks, finishes those that it runs and leaves by itself. One that is leaving
        already is left to do so, and is not among those returned.

        Args:
            names: the workers.
            idle_only: leave those alone that got a task since they were chosen.
        """
        wanted = set(names)
        chosen = [ws for ws in self.scheduler.workers.values() if str(ws.name) in wanted and ws.status not in LEAVING]
        busy = [] if idle_only else [ws for ws in chosen if ws.processing]
        for ws in busy:
            self.drain(ws)
        idle = [ws for ws in chosen if not ws.processing]
        # Those without results need not wait until others' have moved.
        went = await asyncio.gather(
            self.close_workers([ws for ws in idle if ws.has_what]),
            self.close_workers([ws for ws in idle if not ws.has_what]),
        )
        return [str(ws.name) for ws in busy] + [name for part in went for name in part]

    def drain(self, ws: Any) -> None:
        """Give a worker no more tasks, and have it leave when it has ended those that it runs."""
        # As `Scheduler.retire_workers` does: a task that is on its way to it now would only come back.
        stimulus_id = f"htcdask-drain-{time.time()}"
        self.scheduler.handle_worker_status_change(Status.closing_gracefully, ws, stimulus_id)
        self.scheduler.worker_send(ws.address, {"op": DRAIN})

    async def close_workers(self, chosen: list[Any]) -> list[str]:
        """Retire idle workers together; returns the names of those that went."""
        if not chosen:
            return []
        scheduler = self.scheduler
        stimulus_id = f"htcdask-retire-{time.time()}"
        try:
            # It makes those that cannot be emptied take tasks again, and does not tell of them.
            emptied = await scheduler.retire_workers(
                workers=[ws.address for ws in chosen], remove=False, close_workers=False, stimulus_id=stimulus_id
            )
        except (KeyError, CommClosedError):
            logger.warning("htcdask: a worker was lost while workers were retired; they stay", exc_info=True)
            for ws in chosen:
                self.keep(ws, stimulus_id)
            return []
        went = []
        for ws in chosen:
            if ws.address not in emptied:
                continue
            # A task may have reached it before it stopped taking any, and a result while others' were moved.
            if ws.processing or any(len(task.who_has) == 1 for task in ws.has_what):
                self.keep(ws, stimulus_id)
                continue
            if scheduler.workers.get(ws.address) is ws:
                await scheduler.remove_worker(ws.address, expected=True, close=True, stimulus_id=stimulus_id)
            went.append(str(ws.name))
        return went

    async def quiet(self, quiet: bool) -> None:
        """Have the workers write nothing to the submitting host, which has no room for it, or write again."""
        for ws in list(self.scheduler.workers.values()):
            if str(ws.name).startswith("htcdask-"):  # another's would not know what is meant
                self.scheduler.worker_send(ws.address, {"op": QUIET, "quiet": quiet})

    def keep(self, ws: Any, stimulus_id: str) -> None:
        """Have a worker take tasks again; it tells the scheduler that it does (as `Scheduler.retire_workers` does)."""
        if self.scheduler.workers.get(ws.address) is ws and ws.status is Status.closing_gracefully:
            # It removes a worker that it cannot send to.
            self.scheduler.worker_send(
                ws.address, {"op": "worker-status-change", "status": "running", "stimulus_id": stimulus_id}
            )

    # What the scheduler calls, beside `transition`.

    def add_worker(self, scheduler: Any, worker: str) -> None:
        """It is idle from now."""
        self.counter.last_busy[worker] = time.monotonic()

    def remove_worker(self, scheduler: Any, worker: str, **kwargs: Any) -> None:
        """Forget it."""
        self.counter.last_busy.pop(worker, None)

    def restart(self, scheduler: Any) -> None:
        """All tasks are forgotten."""
        self.counter.count()

    def valid_workers_downscaling(self, scheduler: Any, workers: list[Any]) -> list[Any]:
        """The gateway's service closes what exceeds its own count, which is none: ours are not its to close."""
        return [ws for ws in workers if not str(ws.name).startswith(WORKER_PREFIX)]

    async def watch(self, idle_timeout: float) -> None:
        """End the cluster when nobody has renewed its lease, or when it was idle for the time that the gateway sets."""
        last_transition: Any = None
        idle_from = time.monotonic()
        while True:
            periods = [value for value in (self.scheduler_lease, idle_timeout) if value > 0]
            await asyncio.sleep(min([15.0, *(value / 4 for value in periods)]))
            now = time.monotonic()
            log = self.scheduler.transition_log
            newest = log[-1] if log else None
            waiting = self.scheduler.queued or self.scheduler.unrunnable
            if waiting or newest is not last_transition or any(ws.processing for ws in self.scheduler.workers.values()):
                last_transition, idle_from = newest, now
            if self.scheduler_lease and now > self.ends:
                await self.end(f"no supervisor has renewed the lease of {self.scheduler_lease:.0f} s")
            elif idle_timeout and now - idle_from > idle_timeout:
                await self.end(f"it has been idle for {idle_timeout:.0f} s")

    async def spread(self) -> None:
        """Keep tasks that ask for resources from piling up on the workers that came first."""
        took = 0.0
        while True:
            # Of the scheduler's time it takes one part in a hundred at most, however many workers there are.
            await asyncio.sleep(max(SPREAD_INTERVAL, 100 * took))
            begun = time.perf_counter()
            if self.counter.kinds.restricted:
                try:
                    rebalance(self.scheduler)
                except Exception:
                    logger.warning("htcdask: tasks could not be spread over the workers", exc_info=True)
            took = time.perf_counter() - begun

    async def listen(self) -> None:
        """Give up workers of ours of which nothing is heard, so that their tasks run elsewhere."""
        silence, looked = Heartbeats(), time.monotonic()
        while True:
            await asyncio.sleep(INTERVAL)
            now, workers = time.monotonic(), self.scheduler.workers
            ours = {key: ws.last_seen for key, ws in workers.items() if str(ws.name).startswith(WORKER_PREFIX)}
            # As in `Scheduler.check_worker_ttl`: the more workers there are, the less often each has to speak.
            limit = max(WORKER_TTL, 10 * heartbeat_interval(len(workers)))
            lost = silence.lost(ours, now - looked, limit)
            looked = now
            for address in lost:
                logger.warning("htcdask: nothing was heard of worker %s for %.0f s: it is given up", address, limit)
                try:
                    await self.scheduler.remove_worker(address, stimulus_id=f"htcdask-lost-{time.time()}")
                except Exception:
                    logger.warning("htcdask: worker %s could not be removed", address, exc_info=True)

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
