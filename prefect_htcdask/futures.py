"""Futures of task runs on Dask, and the collector that brings their final states home in bulk.

A state, and the result in it, stays on its worker until someone asks: `wait`, `result`, `state` or a done-callback.
From then on the flow's process holds it and the Dask future is released, so that a task run whose result was collected
is never run again because its worker died. Whatever Dask itself reports (a lost worker, a lost scheduler, a cancelled
future) becomes a Crashed state with a message; nothing is swallowed and nothing waits for ever.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar, cast
from uuid import UUID

import distributed
from distributed import Client
from prefect._flow_run_suspension import raise_if_flow_run_suspension_requested
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture, PrefectFutureList
from prefect.states import Cancelled, Crashed
from prefect_dask.task_runners import PrefectDaskFuture

from prefect_htcdask.errors import HTCDaskError
from prefect_htcdask.losses import JobFates, killer_of, lost_reason
from prefect_htcdask.worker_slots import free_worker_slot, worker_slot_freed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prefect.tasks import Task

    from prefect_htcdask.resubmission import Spec

R = TypeVar("R")

POLL = 0.5
"""Seconds between two looks at a blocked wait: a thread that waits in C for ever hears no timeout of a flow run."""

COMING = ("pending", "lost")
"""Status of Dask futures that are still to come: what was lost is computed again."""

MAX_GATHERS = 4

MAX_BROKEN = 10
"""Times that the gathering of one future may break off. Each time that the client finds its connection broken, it waits
until that is there again; so this many have another reason."""

logger = logging.getLogger("prefect.task_runner.htcdask")


class HTCDaskFuture(PrefectDaskFuture[R]):
    """The future of a task run that was submitted by `HTCDaskTaskRunner`."""

    def __init__(
        self,
        task_run_id: UUID,
        wrapped_future: distributed.Future[Any],
        collector: Collector | None = None,
        task_name: str = "",
        task: Task[Any, Any] | None = None,
        upstreams: Sequence[HTCDaskFuture[Any]] = (),
        spec: Spec | None = None,
    ) -> None:
        super().__init__(task_run_id=task_run_id, wrapped_future=wrapped_future)
        self.task_name = task_name
        # Their states are kept while this task run may still need them (`recall`), though the user dropped them.
        self.upstreams = upstreams
        self.spec = spec
        self.task = task
        self._collector = collector
        self._callbacks: list[Callable[[PrefectFuture[R]], None]] = []

    def __reduce__(self) -> Any:
        wrapped = None if self._final_state else self._wrapped_future
        return _rebuild, (type(self), self._task_run_id, wrapped, self._final_state, self.task_name)

    def is_on(self, client: Client) -> bool:
        """Whether Dask still has to bring the state, and a task on `client`'s scheduler can depend on it."""
        return (
            self._final_state is None
            and self._wrapped_future is not None
            and self._wrapped_future.status not in ("error", "cancelled")
            and _same_scheduler(self._wrapped_future.client, client)
        )

    def is_pending(self) -> bool:
        """Whether the task run has not ended yet, as far as Dask's scheduler has told."""
        return self._final_state is None and self._wrapped_future.status in COMING

    @property
    def state(self) -> State[R]:
        """The final state once the task run has ended, else what the Prefect API knows."""
        if self._final_state is None and not self.is_pending():
            self.wait()
        return super().state

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the task run to end.

        Args:
            timeout: seconds to wait at most; the call then returns all the same.
        """
        if self._final_state is None:
            self.collector.wait(self, timeout)
        raise_if_flow_run_suspension_requested()

    def result(self, timeout: float | None = None, raise_on_failure: bool = True) -> R:
        """Wait for the task run's result.

        Args:
            timeout: seconds to wait at most.
            raise_on_failure: raise the exception of a failed task run, else return it.

        Raises:
            TimeoutError: the task run did not end in time.
            TaskRunLost: the worker, the scheduler or the connection was lost.
            HTCDaskError: the cluster cannot do its work.
        """
        self.wait(timeout)
        if self._final_state is None:
            raise TimeoutError(f"Task run {self.task_run_id} did not complete within {timeout} seconds")
        result: R = self._final_state.result(raise_on_failure=raise_on_failure, _sync=True)  # type: ignore[call-overload]
        return result

    def add_done_callback(self, fn: Callable[[PrefectFuture[R]], None]) -> None:
        """Call `fn` with this future once its final state is at hand, in another thread; at once if it is."""
        with self.collector.condition:
            if self._final_state is None:
                self._callbacks.append(fn)
                ask = True
            else:
                ask = False
        if ask:
            # Whoever asks to be called is about to wait, as `prefect.futures.as_completed` does.
            free_worker_slot()
            self.collector.ask(self)
        else:
            fn(self)

    @property
    def collector(self) -> Collector:
        """The collector of this process that brings the state here."""
        if self._collector is None:
            # Unpickled in another process, such as a worker that was handed the future inside a user's object.
            self._collector = collector_of(self._wrapped_future.client)
        return self._collector


def _rebuild(
    cls: type[HTCDaskFuture[Any]],
    task_run_id: UUID,
    wrapped: distributed.Future[Any],
    state: State[Any] | None,
    task_name: str,
) -> HTCDaskFuture[Any]:
    future = cls(task_run_id, wrapped, None, task_name)
    future._final_state = state
    return future


def _same_scheduler(one: Client, other: Client) -> bool:
    return one is other or (
        one.scheduler is not None and other.scheduler is not None and one.scheduler.address == other.scheduler.address
    )


class Collector:
    """Gathers final states for the futures of one Dask client.

    Args:
        client: the client that the futures belong to.
        on_lost: called, in a background thread, with a future that Dask could not finish and the Crashed state that
            it got.
        fates: what is known of the workers' jobs, for the message of a lost task run.
        on_collected: called, in the client's event loop, with futures that have got their final states.
    """

    def __init__(
        self,
        client: Client,
        on_lost: Callable[[HTCDaskFuture[Any], State[Any]], None] | None = None,
        fates: JobFates | None = None,
        on_collected: Callable[[list[HTCDaskFuture[Any]]], None] | None = None,
    ) -> None:
        self.client = client
        self._on_collected = on_collected
        self.cancelled = False  # by the flow run: then what Dask cancels has not crashed
        self.fates = fates or JobFates()
        self.condition = threading.Condition()
        self._on_lost = on_lost
        self._asked: dict[int, HTCDaskFuture[Any]] = {}
        self._ready: list[HTCDaskFuture[Any]] = []
        self._gathers = 0
        self._broken: dict[int, int] = {}
        self._failure: HTCDaskError | None = None
        self._callbacks = ThreadPoolExecutor(1, thread_name_prefix="htcdask-callbacks")

    def ask(self, future: HTCDaskFuture[Any]) -> None:
        """Bring the final state of `future` here as soon as there is one."""
        with self.condition:
            if future._final_state is not None or id(future) in self._asked:
                return
            self._asked[id(future)] = future
            failure = self._failure
        if failure is not None:
            self._end(future, failure)
        elif future.wrapped_future.status == "pending":
            future.wrapped_future.add_done_callback(lambda _: self._enqueue(future))
        elif future.wrapped_future.status == "lost":
            cast(Any, self.client.loop).add_callback(self._enqueue_when_back, future)
        else:
            self._enqueue(future)

    def wait(self, future: HTCDaskFuture[Any], timeout: float | None) -> None:
        """Block until `future` has its final state, or `timeout` seconds are over."""
        self.ask(future)
        deadline = None if timeout is None else time.monotonic() + timeout
        with worker_slot_freed(future._final_state is None), self.condition:
            while future._final_state is None:
                left = POLL if deadline is None else min(POLL, deadline - time.monotonic())
                if left <= 0:
                    return
                self.condition.wait(left)

    def fail(self, error: HTCDaskError) -> None:
        """End every future that is being waited for, and every one that is asked for later, with `error`."""
        with self.condition:
            self._failure = self._failure or error
            waiting = [future for future in self._asked.values() if future._final_state is None]
        for future in waiting:
            self._end(future, error)

    @property
    def failure(self) -> HTCDaskError | None:
        """Why no future of this collector will come, if so."""
        return self._failure

    def close(self) -> None:
        """Run the callbacks that are due, and take no more."""
        self._callbacks.shutdown(wait=False)

    def _enqueue(self, future: HTCDaskFuture[Any]) -> None:
        with self.condition:
            self._ready.append(future)
            start = self._gathers < MAX_GATHERS
            self._gathers += start
        if start:
            cast(Any, self.client.loop).add_callback(self._gather_ready)

    async def _enqueue_when_back(self, future: HTCDaskFuture[Any]) -> None:
        await cast(Any, future.wrapped_future)._state.wait()
        self._enqueue(future)

    async def _gather_ready(self) -> None:
        """Gather whatever is ready, until nothing is: many futures that end together cost one round trip."""
        try:
            while True:
                with self.condition:
                    batch, self._ready = self._ready, []
                    if not batch:
                        self._gathers -= 1
                        return
                await self._gather(batch)
        except BaseException:
            with self.condition:
                self._gathers -= 1
            raise

    async def _gather(self, batch: list[HTCDaskFuture[Any]]) -> None:
        finished = {f.wrapped_future.key: f for f in batch if f.wrapped_future.status == "finished"}
        try:
            states = await self.client.gather(
                {key: future.wrapped_future for key, future in finished.items()}, errors="skip", asynchronous=True
            )
        except Exception as exc:
            states = dict.fromkeys(finished)
            for future in finished.values():
                if isinstance(exc, OSError) and self._try_again(future):
                    batch.remove(future)
                elif future.wrapped_future.status == "finished":
                    self._end(future, exc)
        ended: list[HTCDaskFuture[Any]] = []
        lost: list[HTCDaskFuture[Any]] = []
        for future in batch:
            state = states.get(future.wrapped_future.key)
            if isinstance(state, State):
                future._final_state = state
                ended.append(future)
            elif future.wrapped_future.status in COMING:
                cast(Any, self.client.loop).add_callback(self._enqueue_when_back, future)
            elif future._final_state is None:
                lost.append(future)
        if self._on_collected is not None and ended:
            self._on_collected(ended)
        self._finish(ended)
        for future in lost:
            if (killer := killer_of(future)) is not None:
                await self.fates.wait_for(killer)
            self._end(future, None)

    def _try_again(self, future: HTCDaskFuture[Any]) -> bool:
        """Gather a future later: the connection broke, and the client will say whether its task goes on."""
        with self.condition:
            times = self._broken[id(future)] = self._broken.get(id(future), 0) + 1
        if times > MAX_BROKEN:
            return False
        loop = cast(Any, self.client.loop)
        loop.call_later(POLL, loop.add_callback, self._enqueue_when_back, future)
        return True

    def _end(self, future: HTCDaskFuture[Any], error: BaseException | None) -> None:
        """Give a future that Dask did not finish a Crashed state."""
        if error is None:
            error = lost_reason(future, self.fates)
        cancelled = self.cancelled and future.wrapped_future.status == "cancelled"
        state: State[Any] = (Cancelled if cancelled else Crashed)(message=str(error) or repr(error), data=error)
        state.state_details.task_run_id = future._task_run_id
        with self.condition:
            if future._final_state is not None:
                return
            future._final_state = state
        if self._on_lost is not None:
            try:
                self._on_lost(future, state)
            except Exception:
                logger.exception("Could not report that task run %s crashed", future._task_run_id)
        self._finish([future])

    def _finish(self, futures: list[HTCDaskFuture[Any]]) -> None:
        with self.condition:
            calls = []
            for future in futures:
                self._asked.pop(id(future), None)
                future.upstreams, future.spec = (), None
                self._broken.pop(id(future), None)
                calls += [(fn, future) for fn in future._callbacks]
                future._callbacks = []
            self.condition.notify_all()
        for future in futures:
            with suppress(Exception):
                future.wrapped_future.release()
        if calls:
            with suppress(RuntimeError):
                self._callbacks.submit(_call_all, calls)


def _call_all(calls: list[tuple[Callable[[Any], None], Any]]) -> None:
    for fn, future in calls:
        try:
            fn(future)
        except Exception:
            logger.exception("Error in a done-callback of task run %s", future._task_run_id)


class HTCDaskFutureList(PrefectFutureList[R]):
    """The futures of a `map`. A task that waits for them frees its slot on the worker meanwhile."""

    def wait(self, timeout: float | None = None) -> None:
        """Wait for all of them, `timeout` seconds at most."""
        with worker_slot_freed(any(future._final_state is None for future in self)):
            super().wait(timeout)

    def result(self: HTCDaskFutureList[R], timeout: float | None = None, raise_on_failure: bool = True) -> list[R]:
        """The results of all, in order; see `prefect.futures.PrefectFutureList.result`."""
        with worker_slot_freed(any(future._final_state is None for future in self)):
            return super().result(timeout, raise_on_failure)


_collectors_lock = threading.Lock()
_collectors: dict[str, Collector] = {}


def collector_of(client: Client) -> Collector:
    """This process's collector for a client that no live run owns, such as a worker's own one."""
    with _collectors_lock:
        for key in [key for key, collector in _collectors.items() if collector.client.status == "closed"]:
            _collectors.pop(key).close()
        collector = _collectors.get(client.id)
        if collector is None:
            collector = _collectors[client.id] = Collector(client)
        return collector
