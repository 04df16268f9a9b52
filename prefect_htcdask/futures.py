"""Futures of task runs on Dask.

A state, and the result in it, stays on its worker until someone asks: `wait`, `result`, `state` or a done-callback; a
small one also comes a little ahead, where someone asks for one after the other (`read_ahead`).
From then on the flow's process holds it and the Dask future is released, so that a task run whose result was collected
is never run again because its worker died. The `collector` brings it.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar, cast
from uuid import UUID

import distributed
from distributed import Client
from prefect._flow_run_suspension import raise_if_flow_run_suspension_requested
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound
from prefect.futures import PrefectFuture, PrefectFutureList
from prefect_dask.task_runners import PrefectDaskFuture

from prefect_htcdask.client_collectors import collector_of
from prefect_htcdask.collector import COMING, Collector
from prefect_htcdask.errors import TaskRunLost
from prefect_htcdask.packed_states import PackedState
from prefect_htcdask.prefect_api import open_client
from prefect_htcdask.worker_slots import free_worker_slot, worker_slot_freed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prefect.tasks import Task

    from prefect_htcdask.resubmission import Spec

R = TypeVar("R")

API_LAG = 10.0
"""Seconds in which Prefect's server records the task runs of a flow run that has ended."""


class CollectedFuture:
    """Stands for Dask's future of a task run whose final state is in hand, and of which Dask has let go.

    It is a fraction of the other's size. Nothing can be submitted that depends on it; the state serves for that.
    """

    __slots__ = ("_packed", "client", "key")
    status = "finished"

    def __init__(self, key: str, client: Client, packed: PackedState) -> None:
        self.key = key
        self.client = client
        self._packed = packed

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.key}>"

    def result(self, timeout: float | None = None) -> State[Any]:
        """The final state, at once."""
        return self._packed.state

    def done(self) -> bool:
        """Whether the task has ended: it has."""
        return True

    def cancelled(self) -> bool:
        """Whether the task was cancelled: it was not."""
        return False


class HTCDaskFuture(PrefectDaskFuture[R]):
    """The future of a task run that was submitted by `HTCDaskTaskRunner`.

    Its `wrapped_future` is Dask's, whose result is the task run's final `State`. Once that state is in hand, Dask's
    future is released, and a `CollectedFuture` takes its place.

    Attributes:
        place, following: its place in the order of submits, and the next in it (`read_ahead`).
    """

    place: int = 0
    following: weakref.ref[Any] | None = None

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
        self._callbacks: tuple[Callable[[PrefectFuture[R]], None], ...] = ()

    def __reduce__(self) -> Any:
        state = self._final_state
        wrapped = self._wrapped_future if state is None else None
        return _rebuild, (type(self), self._task_run_id, wrapped, state, self.task_name)

    @property
    def _final_state(self) -> State[R] | None:
        # Where Prefect's base classes and functions look for it and leave it.
        return self.packed.state if self.packed is not None else None

    @_final_state.setter
    def _final_state(self, state: State[R] | None) -> None:
        self.packed: PackedState | None = PackedState(state) if state is not None else None

    def is_on(self, client: Client) -> bool:
        """Whether Dask still has to bring the state, and a task on `client`'s scheduler can depend on it."""
        return (
            self.packed is None
            and self._wrapped_future is not None
            and self._wrapped_future.status not in ("error", "cancelled")
            and _same_scheduler(self._wrapped_future.client, client)
        )

    def is_pending(self) -> bool:
        """Whether the task run has not ended yet, as far as Dask's scheduler has told."""
        return self.packed is None and self._wrapped_future.status in COMING

    @property
    def state(self) -> State[R]:
        """The final state once the task run has ended, else what the Prefect API knows.

        It is kept packed: the same object for as long as somebody holds it.
        """
        if self.packed is None and not self.is_pending() and not self.collector.over:
            self.wait()
        packed = self.packed
        return packed.state if packed is not None else super().state

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the task run to end.

        Args:
            timeout: seconds to wait at most; the call then returns all the same.
        """
        if self.packed is None:
            self.collector.wait(self, timeout)
            if self.packed is None and self.collector.over:
                self._ask_api(timeout)
        raise_if_flow_run_suspension_requested()

    def _ask_api(self, timeout: float | None) -> None:
        """Take the final state from the Prefect API: Dask's part of the flow run is over."""
        deadline = (self.collector.closed_at or 0.0) + API_LAG
        if timeout is not None:
            deadline = min(deadline, time.monotonic() + timeout)
        with open_client(timeout=None, retries=None) as api:
            while True:
                state: State[Any] | None = None
                with suppress(ObjectNotFound):
                    state = api.read_task_run(self.task_run_id).state
                if state is not None and state.is_final():
                    self.collector.give(self, state)
                    return
                if time.monotonic() > deadline:
                    return
                time.sleep(0.2)

    def result(self, timeout: float | None = None, raise_on_failure: bool = True) -> R:
        """Wait for the task run's result.

        Once the flow run has ended, that is the persisted one; a result that was not persisted is gone with its worker.

        Args:
            timeout: seconds to wait at most.
            raise_on_failure: raise the exception of a failed task run, else return it.

        Raises:
            TimeoutError: the task run did not end in time.
            TaskRunLost: the worker, the scheduler or the connection was lost.
            HTCDaskError: the cluster cannot do its work.
            prefect.exceptions.MissingResult: the flow run has ended, and the result was not persisted.
        """
        self.wait(timeout)
        packed = self.packed
        if packed is None:
            if self.collector.over:
                raise TaskRunLost(
                    f"the flow run of task run {self.task_run_id} ({self.task_name}) is over, not this one"
                )
            raise TimeoutError(f"Task run {self.task_run_id} did not complete within {timeout} seconds")
        if packed.has_result:
            # What `State.result` answers then, without an event loop in another thread.
            return cast(R, packed.data)
        result: R = packed.state.result(raise_on_failure=raise_on_failure, _sync=True)  # type: ignore[call-overload]
        return result

    def add_done_callback(self, fn: Callable[[PrefectFuture[R]], None]) -> None:
        """Call `fn` with this future once its final state is at hand, in another thread; at once if it is."""
        if self.packed is None:
            # Whoever asks to be called is about to wait, as `prefect.futures.as_completed` does.
            free_worker_slot()
            with self.collector.condition:
                waits = self.packed is None and not self.collector.over
                if waits:
                    self._callbacks += (fn,)
                    self.collector.ask(self)
            if waits:
                return
            self.wait()
        fn(self)

    def let_go(self) -> None:
        """Let go of Dask's future, and of what it took to bring the final state here, which is in hand now."""
        self.upstreams, self.spec, self._callbacks = (), None, ()
        wrapped, packed = self._wrapped_future, self.packed
        if isinstance(wrapped, CollectedFuture) or packed is None:
            return
        if wrapped.status == "finished":
            # Dask releases it where nobody else holds it, such as a submit that is going on (`UpstreamFutures`).
            self._wrapped_future = cast(Any, CollectedFuture(str(wrapped.key), wrapped.client, packed))
        else:
            # It still says what became of the task.
            with suppress(Exception):
                wrapped.release()

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


class HTCDaskFutureList(PrefectFutureList[R]):
    """The futures of a `map`. A task that waits for them frees its slot on the worker meanwhile."""

    def wait(self, timeout: float | None = None) -> None:
        """Wait for all of them, `timeout` seconds at most."""
        coming = _coming(self)
        with worker_slot_freed(bool(coming)):
            # Prefect's own waits for one after the other, and each state would come home alone.
            for future in coming:
                if isinstance(future, HTCDaskFuture):
                    future.collector.ask(future)
            deadline = None if timeout is None else time.monotonic() + timeout
            for future in coming:
                if isinstance(future, HTCDaskFuture) and future.packed is None:
                    left = None if deadline is None else max(0.0, deadline - time.monotonic())
                    future.collector.wait(future, left, of_many=True)
            super().wait(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def result(self: HTCDaskFutureList[R], timeout: float | None = None, raise_on_failure: bool = True) -> list[R]:
        """The results of all, in order; see `prefect.futures.PrefectFutureList.result`."""
        with worker_slot_freed(bool(_coming(self))):
            return super().result(timeout, raise_on_failure)


def _coming(futures: Iterable[PrefectFuture[Any]]) -> list[PrefectFuture[Any]]:
    """Those whose final states are not in hand; a user may have put futures of another runner among them."""
    return [one for one in futures if (one.packed if isinstance(one, HTCDaskFuture) else one._final_state) is None]
