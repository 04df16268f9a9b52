"""A Dask client whose futures outlive a broken connection to the scheduler.

Dask's own client cancels all of its futures then (distributed, `Client._reconnect`). This one leaves them pending,
connects again, and asks the scheduler for what it has kept (`client_recovery`); what that does not know is submitted
again (`task_spec`). Submits wait meanwhile. When the connection does not come back in time, all of them fail.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakValueDictionary

from dask.base import annotate
from distributed import Future
from prefect_dask.client import PrefectDaskClient

from prefect_htcdask.compat.dask import (
    connect,
    connect_timeout,
    drop_pending_messages,
    scheduler_id,
    send,
    send_to_scheduler,
    subscribed_topics,
)
from prefect_htcdask.errors import TaskRunLost
from prefect_htcdask.gateway.dask_client import InterruptibleClient
from prefect_htcdask.runner.client.submit_buffer import BufferedClient, SubmitBuffer
from prefect_htcdask.runner.client.task_spec import TaskSpec, graphs, tasks_to_resubmit
from prefect_htcdask.runner.client.uploaded_state import UploadedState
from prefect_htcdask.scheduler.client_recovery import KEEP, LEAVE, RESUME
from prefect_htcdask.scheduler.worker_loss import LOST_ANNOTATION
from prefect_htcdask.utils.aio import in_thread

ATTEMPT = 10.0
"""Seconds for one attempt to connect."""

_PAUSES = (0.1, 0.2, 0.5)
"""Seconds between attempts; the last goes on."""

STAND_IN = 30.0
"""Seconds for which the scheduler keeps the work longer than this side tries to connect."""

LOSSES, WITHIN = 5, 600.0
"""A connection that is lost more often than this within so many seconds is given up."""

_HELD = 60.0
"""Seconds for which upstream results that are sent along are wanted; those who need them have come by then."""

logger = logging.getLogger("prefect.task_runner.htcdask")


@dataclass(frozen=True)
class ReconnectPolicy:
    """How a live run wants its connection to be renewed.

    Attributes:
        patience: seconds for which to try.
        failure_grace: seconds in which somebody else may say why, before the lost connection is the reason.
        goes_on: whether there is any use in it: not where the run is closing, or its cluster has failed.
        final_state_of: finds the state in which a task ended, by its key, where this process has it.
        results_in_hand: how many of these there are.
        log: writes to the flow run's log; level and text.
        fail: is told why the connection is given up, before the futures are cancelled; may block.
    """

    patience: float
    failure_grace: float
    goes_on: Callable[[], bool]
    final_state_of: Callable[[str], Any | None]
    results_in_hand: Callable[[], int]
    log: Callable[[str, str], None]
    fail: Callable[[TaskRunLost], None]


class ReconnectingClient(InterruptibleClient, BufferedClient, PrefectDaskClient):
    """A `distributed.Client` that resumes its work after its connection was lost, once it has a `ReconnectPolicy`."""

    submit_buffer: SubmitBuffer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.specs: WeakValueDictionary[str, TaskSpec] = WeakValueDictionary()
        self.held_states: dict[str, UploadedState] = {}
        self._policy: ReconnectPolicy | None = None
        self._there = threading.Event()
        self._there.set()
        self._sending = threading.Lock()
        self._losses: deque[float] = deque(maxlen=LOSSES)
        self._given_up: TaskRunLost | None = None
        self.submit_buffer = SubmitBuffer(self)
        super().__init__(*args, **kwargs)

    def resume_on(self, policy: ReconnectPolicy) -> None:
        """Outlive losses of the connection from now on; the scheduler must have the plugin `ClientRecoveryPlugin`."""
        self.sync(getattr(self._scheduler, KEEP), client=self.id, seconds=policy.patience + STAND_IN)
        self._policy = policy

    @property
    def timeout(self) -> float:
        """Seconds in which Dask's own client would have to connect."""
        return connect_timeout(self)

    @property
    def lost_lately(self) -> bool:
        """Whether the connection was lost within the last minutes."""
        return bool(self._losses) and time.monotonic() - self._losses[-1] < 300

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Wait until there is a connection; what is sent within reaches the scheduler, or is sent again.

        Nothing in it may wait for this client's event loop.

        Raises:
            TaskRunLost: the connection was given up.
        """
        while True:
            self._there.wait()
            with self._sending:
                if self._there.is_set():
                    if self._given_up is not None:
                        raise self._given_up
                    yield
                    return

    def set_metadata(self, key: Any, value: Any) -> None:
        """As `distributed.Client.set_metadata`, over losses of the connection."""
        deadline: float | None = None
        while True:
            with self.connected():
                pass
            try:
                super().set_metadata(key, value)
                return
            except OSError:
                # The loss may be noticed here before the stream of messages breaks.
                deadline = deadline or time.monotonic() + 2 * ATTEMPT
                if self._policy is None or time.monotonic() > deadline or self.status == "closed":
                    raise
                time.sleep(_PAUSES[-1])

    @property
    def _scheduler(self) -> Any:
        return cast(Any, self).scheduler

    async def _close(self, fast: bool = False) -> None:
        if self._policy is not None and self.status != "closed":
            # The scheduler need not wait for this client to come back.
            with suppress(Exception):
                send_to_scheduler(self, {"op": LEAVE})
        await super()._close(fast=fast)
        self._there.set()

    async def _reconnect(self) -> None:
        policy = self._policy
        if policy is None:
            await super()._reconnect()
            return
        self.status = "connecting"
        self.scheduler_comm = None
        with self._sending:
            self._there.clear()
        lost_at = time.monotonic()
        states = dict(self.futures)
        # Whatever a worker held of results may be gone as well: the scheduler will say.
        for state in states.values():
            if state.status in ("finished", "lost"):
                state.reset()
        try:
            why = self._too_often(lost_at) or await self._take_up(policy, lost_at, list(states))
            if why:
                await self._give_up(policy, why)
        finally:
            self._there.set()

    def _too_often(self, now: float) -> str:
        if len(self._losses) == LOSSES and now - self._losses[0] < WITHIN:
            return f"was lost {LOSSES + 1} times within {now - self._losses[0]:.0f} s"
        self._losses.append(now)
        return ""

    async def _take_up(self, policy: ReconnectPolicy, lost_at: float, held: list[str]) -> str:
        """Connect, and have all that is unfinished go on; returns why that came to nothing."""
        scheduler = scheduler_id(self)
        deadline = lost_at + policy.patience
        pauses = iter(_PAUSES)
        pause = _PAUSES[0]
        last: BaseException | None = None
        while self.status in ("connecting", "running"):
            left = deadline - time.monotonic()
            if left <= 0:
                return f"was lost, and could not be made again within {policy.patience:g} s ({last or 'no answer'})"
            if not policy.goes_on():
                return "was lost"
            try:
                await self._connect(min(left, ATTEMPT))
                if scheduler and scheduler_id(self) not in (None, scheduler):
                    return "was lost: another scheduler answers there now, which knows nothing of this flow run"
                keys = [key for key in held if key in self.futures and self.futures[key].status == "pending"]
                seconds = policy.patience + STAND_IN
                asking = getattr(self._scheduler, RESUME)(client=self.id, keys=keys, seconds=seconds)
                known = set(await asyncio.wait_for(asking, ATTEMPT))
            except (OSError, asyncio.TimeoutError) as exc:
                if last is None:
                    policy.log(
                        "warning",
                        f"The connection to the Dask scheduler at {self._address()} was lost; it is tried for "
                        f"{policy.patience:g} s to make it again. What runs there may run on meanwhile",
                    )
                last = exc
                pause = next(pauses, pause)
                await asyncio.sleep(min(pause, max(0.0, left)))
                continue
            try:
                await self._go_on(policy, keys, known, lost_at)
            except Exception as exc:
                # Nobody would read what the scheduler tells.
                return f"was lost, and what is unfinished could not be submitted again ({exc!r})"
            return ""
        return ""  # closed by this side

    async def _connect(self, timeout: float) -> None:
        comm = self.scheduler_comm
        if comm is not None and comm.comm.closed():
            self.status, self.scheduler_comm = "connecting", None
        # What was on its way to the old connection is submitted again where the scheduler has not got it; sent from
        # here it would come before that on which it depends.
        await asyncio.sleep(0)
        drop_pending_messages(self, self._is_ours)
        await connect(self, timeout)

    def _is_ours(self, message: dict[str, Any]) -> bool:
        return message.get("op") == "update-graph" and any(
            key in self.specs or key in self.held_states for key in message["keys"]
        )

    async def _go_on(self, policy: ReconnectPolicy, keys: list[str], known: set[str], lost_at: float) -> None:
        """Submit again what the scheduler does not know, and hear again what is told to this client."""
        for topic in subscribed_topics(self):
            send_to_scheduler(self, {"op": "subscribe-topic", "topic": topic, "client": self.id})
        lost: list[TaskSpec] = []
        states: list[UploadedState] = []
        for key in keys:
            state = self.futures.get(key)
            if key in known or state is None:
                continue
            spec = self.specs.get(key)
            if spec is not None:
                lost.append(spec)
            elif (held_state := self.held_states.get(key)) is not None:
                states.append(held_state)
            else:
                _cancel(state)
        held: list[Future[Any]] = []
        if lost or states:
            held = await asyncio.to_thread(self._submit_again, policy, lost, known, states)
        cast(Any, self).loop.call_later(_HELD, held.clear)
        kept = sum(1 for key in known if key in self.specs)
        policy.log(
            "warning",
            f"The connection to the Dask scheduler was lost, and is there again after {time.monotonic() - lost_at:.1f} "
            f"s: of {kept + len(lost)} unfinished task runs the scheduler has kept {kept}, and {len(lost)} were "
            f"submitted again; {policy.results_in_hand()} results in hand are kept",
        )

    def _submit_again(
        self, policy: ReconnectPolicy, lost: list[TaskSpec], known: set[str], held_states: list[UploadedState]
    ) -> list[Future[Any]]:
        """Send the graphs; returns what must be wanted until they have come."""
        held = [one.send(self) for one in held_states]
        known = known.union(one.key for one in held_states)
        states: dict[str, Any] = {}

        def final_state_of(key: str) -> bool:
            state = policy.final_state_of(key)
            if state is not None:
                states[key] = state
            return state is not None

        specs = tasks_to_resubmit(lost, known, final_state_of)
        for spec in specs:
            spec.sent = True
        # Whether it had begun, the Prefect API will tell the worker that takes it up (`rerun`).
        why = "the connection to the Dask scheduler"
        mark = {"times": 1, "workers": [], "begun": False, "held": False, "why": why}
        wanted = {spec.key for spec in lost}
        order = {spec.key: spec.number for spec in specs}
        for nodes, keys, options in graphs(specs, states):
            with annotate(**{**options.annotations, LOST_ANNOTATION: mark}):
                futures = send(self, nodes, keys, order, options.resources)
            held += [future for future in futures if future.key not in wanted]
        return held

    async def _give_up(self, policy: ReconnectPolicy, why: str) -> None:
        """Fail: every future is cancelled, as Dask's own client does it at once."""
        error = TaskRunLost(f"the connection to the Dask scheduler at {self._address()} {why}")
        deadline = time.monotonic() + policy.failure_grace
        while policy.goes_on() and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        if policy.goes_on():
            await in_thread(policy.fail, error)
        self._given_up = error
        for state in list(self.futures.values()):
            if state.status == "pending":
                _cancel(state)
        self.futures.clear()
        await self._close()

    def _address(self) -> str:
        scheduler = self._scheduler
        return str(getattr(scheduler, "address", "an unknown address"))


def _cancel(state: Any) -> None:
    state.cancel(reason="scheduler-connection-lost", msg="The connection to the scheduler was lost.")
