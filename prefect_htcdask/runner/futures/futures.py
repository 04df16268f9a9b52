"""Futures of task runs on Dask.

A state, and the result in it, stays on its worker until someone asks: `wait`, `result`, `state` or a done-callback; a
small one also comes a little ahead, where someone asks for one after the other (`prefetch`).
From then on the flow's process holds it and the Dask future is released, so that a task run whose result was collected
is never run again because its worker died. The `gatherer` brings it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar, cast
from uuid import UUID

import distributed
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture, PrefectFutureList
from prefect_dask.task_runners import PrefectDaskFuture

from prefect_htcdask.compat.prefect import stop_if_suspended
from prefect_htcdask.errors import TaskRunLost
from prefect_htcdask.runner.futures.compact_state import CompactState
from prefect_htcdask.runner.futures.gatherer import Gatherer, gatherer_of
from prefect_htcdask.runner.futures.pending_result import PendingResult
from prefect_htcdask.worker.secede import secede, seceded

R = TypeVar("R")


class HTCDaskFuture(PrefectDaskFuture[R]):
    """The future of a task run that was submitted by `HTCDaskTaskRunner`.

    Its `wrapped_future` is Dask's, whose result is the task run's final `State`. Once that state is in hand, Dask's
    future is released, and a `CollectedFuture` takes its place.

    Args:
        pending_result: the record of the task run, in which all that becomes of it stands.
        gatherer: brings the final state; by default this process's one for the Dask future's client.
    """

    def __init__(self, pending_result: PendingResult, gatherer: Gatherer | None = None) -> None:
        # Without Prefect's own, which would keep a copy of what stands in the record.
        self.pending_result = pending_result
        self._gatherer = gatherer

    def __reduce__(self) -> Any:
        result = self.pending_result
        state = self._final_state
        wrapped = result.dask_future if state is None else None
        return _rebuild, (type(self), result.task_run_id, wrapped, state, result.task_name)

    @property
    def task_run_id(self) -> UUID:
        """The id of the task run."""
        return self.pending_result.task_run_id

    @property
    def wrapped_future(self) -> distributed.Future[Any]:
        """Dask's future of the task run's final state."""
        return self.pending_result.dask_future

    @property
    def packed(self) -> CompactState | None:
        """The final state, once it is in hand."""
        return self.pending_result.packed

    @property
    def _final_state(self) -> State[R] | None:  # type: ignore[override]
        # Where Prefect's functions look for it; of its classes, those methods that leave it there are not used.
        return self.packed.state if self.packed is not None else None

    def is_pending(self) -> bool:
        """Whether the task run has not ended yet, as far as Dask's scheduler has told."""
        return self.pending_result.is_pending()

    @property
    def state(self) -> State[R]:
        """The final state once the task run has ended, else what the Prefect API knows.

        It is kept packed: the same object for as long as somebody holds it.
        """
        if self.packed is None and not self.is_pending() and not self.gatherer.closed:
            self.wait()
        packed = self.packed
        return packed.state if packed is not None else super().state

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the task run to end.

        Args:
            timeout: seconds to wait at most; the call then returns all the same.
        """
        if self.packed is None:
            self.gatherer.wait(self.pending_result, timeout)
        stop_if_suspended()

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
            if self.gatherer.closed:
                about = f"task run {self.task_run_id} ({self.pending_result.task_name})"
                raise TaskRunLost(f"the flow run of {about} is over, not this one")
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
            secede()
            if self.gatherer.call_back(self.pending_result, partial(fn, self)):
                return
            self.wait()
        fn(self)

    @property
    def gatherer(self) -> Gatherer:
        """The collector of this process that brings the state here."""
        if self._gatherer is None:
            # Unpickled in another process, such as a worker that was handed the future inside a user's object.
            self._gatherer = gatherer_of(self.wrapped_future.client)
        return self._gatherer


def _rebuild(
    cls: type[HTCDaskFuture[Any]],
    task_run_id: UUID,
    wrapped: distributed.Future[Any],
    state: State[Any] | None,
    task_name: str,
) -> HTCDaskFuture[Any]:
    result = PendingResult(task_run_id, wrapped, task_name)
    if state is not None:
        result.packed = CompactState(state)
    return cls(result)


class HTCDaskFutureList(PrefectFutureList[R]):
    """The futures of a `map`. A task that waits for them frees its slot on the worker meanwhile."""

    def wait(self, timeout: float | None = None) -> None:
        """Wait for all of them, `timeout` seconds at most."""
        coming = _coming(self)
        with seceded(bool(coming)):
            # Prefect's own waits for one after the other, and each state would come home alone.
            for future in coming:
                if isinstance(future, HTCDaskFuture):
                    future.gatherer.request(future.pending_result)
            deadline = None if timeout is None else time.monotonic() + timeout
            for future in coming:
                if isinstance(future, HTCDaskFuture) and future.packed is None:
                    left = None if deadline is None else max(0.0, deadline - time.monotonic())
                    future.gatherer.wait(future.pending_result, left, of_many=True)
            super().wait(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def result(self: HTCDaskFutureList[R], timeout: float | None = None, raise_on_failure: bool = True) -> list[R]:
        """The results of all, in order; see `prefect.futures.PrefectFutureList.result`."""
        with seceded(bool(_coming(self))):
            return super().result(timeout, raise_on_failure)


def _coming(futures: Iterable[PrefectFuture[Any]]) -> list[PrefectFuture[Any]]:
    """Those whose final states are not in hand; a user may have put futures of another runner among them."""
    return [one for one in futures if (one.packed if isinstance(one, HTCDaskFuture) else one._final_state) is None]
