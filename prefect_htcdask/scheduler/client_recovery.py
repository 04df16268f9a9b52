"""The plugin on the Dask scheduler that keeps the work of a client whose connection breaks, until it is back.

Dask forgets what a client wanted as soon as its connection is closed, though the tasks run on and the client is about
to connect again (distributed, `Scheduler.remove_client`). Here another client stands in for it meanwhile, one without a
connection, as Dask's own queues and variables have them. A client asks for that, and takes its leave when it closes.
Workers that are lost at the same time are held against no task: it tells the plugin of `worker_loss`, if that is there.

It travels by value to the scheduler: of this package it imports a name only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any

from distributed.diagnostics.plugin import SchedulerPlugin

from prefect_htcdask.scheduler.worker_loss import WORKER_LOSS

KEEP, RESUME, LEAVE = "htcdask_keep", "htcdask_resume", "htcdask-leave"
"""Names of the scheduler's handlers: two that are asked, and one of the stream from a client."""


class ClientRecoveryPlugin(SchedulerPlugin):
    """Holds what vanished clients wanted, each for the time that it asked for."""

    name = "htcdask-kept-work"
    idempotent = True

    def __init__(self) -> None:
        self.scheduler: Any = None
        self.seconds: dict[str, float] = {}
        self.timers: dict[str, Any] = {}

    async def start(self, scheduler: Any) -> None:
        """Take requests."""
        self.scheduler = scheduler
        scheduler.handlers[KEEP] = self.keep
        scheduler.handlers[RESUME] = self.resume
        scheduler.stream_handlers[LEAVE] = self.leave

    def keep(self, client: str, seconds: float) -> None:
        """Keep a client's work for so many seconds, whenever it vanishes."""
        self.seconds[client] = seconds

    def leave(self, client: str) -> None:
        """A client is about to close: what it wanted may be forgotten."""
        self.seconds.pop(client, None)

    def log_event(self, topic: str, msg: Any) -> None:
        """Hear of the loss of a client before the scheduler forgets what it wanted."""
        if topic == "all" and isinstance(msg, dict) and msg.get("action") == "remove-client":
            self.on_client_lost(msg["client"])

    def on_client_lost(self, client: str) -> None:
        """Stand in for it."""
        state = self.scheduler.clients.get(client)
        if client not in self.seconds or state is None:
            return
        if (worker_loss := self.scheduler.plugins.get(WORKER_LOSS)) is not None:
            worker_loss.client_lost()
        keys = [task.key for task in state.wants_what]
        self.scheduler.client_desires_keys(keys=keys, client=placeholder_client(client))
        self.stop_timer(client)
        self.timers[client] = asyncio.get_running_loop().call_later(self.seconds[client], self.give_up, client)

    def give_up(self, client: str) -> None:
        """A client did not come back in time."""
        self.seconds.pop(client, None)
        self.let_go(client)

    def resume(self, client: str, keys: Iterable[str], seconds: float) -> list[str]:
        """Give a client that is back what it still wants; returns the keys that there are. Others are let go of."""
        tasks = self.scheduler.tasks
        known = [key for key in keys if key in tasks]
        # Those that are done are told of at once on its stream, the others as they end.
        self.scheduler.client_desires_keys(keys=known, client=client)
        # Nobody wanted these any more, though something that was made of them is still there.
        released = {key: "waiting" for key in known if tasks[key].state == "released"}
        self.scheduler.transitions(released, stimulus_id=f"htcdask-resume-{time.time()}")
        self.seconds[client] = seconds
        self.let_go(client)
        return known

    def let_go(self, client: str) -> None:
        """End standing in for a client."""
        self.stop_timer(client)
        name = placeholder_client(client)
        state = self.scheduler.clients.get(name)
        if state is not None:
            self.scheduler.client_releases_keys(keys=[task.key for task in state.wants_what], client=name)
            del self.scheduler.clients[name]

    def stop_timer(self, client: str) -> None:
        """It is settled what becomes of a client's work."""
        timer = self.timers.pop(client, None)
        if timer is not None:
            timer.cancel()


def placeholder_client(client: str) -> str:
    """Name of the client that stands in for another."""
    return f"htcdask-stand-in-for-{client}"
