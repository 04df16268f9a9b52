"""Prefect's task engine, as it runs on a worker: a result that cannot leave the worker fails its task run there.

So the Prefect API hears of it before anybody reads the result, and the flow sees the same state.
"""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import State
from prefect.task_engine import AsyncTaskRunEngine, SyncTaskRunEngine
from prefect.tasks import Task

from prefect_htcdask.compat.prefect import data_of, put_data, stop_if_suspended
from prefect_htcdask.errors import UnpicklableResultError
from prefect_htcdask.worker.pickling import why_unpicklable
from prefect_htcdask.worker.portable_states import portable


def check_result(task: Task[Any, Any], state: State[Any]) -> None:
    """Check that the result in a state can leave its worker.

    Raises:
        UnpicklableResultError: it is that of a completed task run, and cannot be pickled.
    """
    if not state.is_completed():
        return
    result = data_of(state)
    if isinstance(result, BaseException) or (reason := why_unpicklable(result)) is None:
        return
    raise UnpicklableResultError(_refusal(task, result, reason)) from reason


def _refusal(task: Task[Any, Any], result: Any, reason: Exception) -> str:
    kind = type(result)
    return (
        f"the result of task {task.name!r}, a {kind.__module__}.{kind.__qualname__}, cannot be pickled, and so cannot "
        f"leave its worker ({type(reason).__name__}: {reason}): return what can be, such as the data in it or the path "
        "of a file, and make the rest of it again in the task that needs it"
    )


class _SyncEngine(SyncTaskRunEngine[Any, Any]):
    def set_state(self, state: State[Any], force: bool = False) -> State[Any]:
        check_result(self.task, state)
        return super().set_state(state, force)

    def can_retry(self, exc_or_state: Any) -> bool:
        # It would come to the same.
        return not isinstance(exc_or_state, UnpicklableResultError) and super().can_retry(exc_or_state)


class _AsyncEngine(AsyncTaskRunEngine[Any, Any]):
    async def set_state(self, state: State[Any], force: bool = False) -> State[Any]:
        check_result(self.task, state)
        return await super().set_state(state, force)

    async def can_retry(self, exc_or_state: Any) -> bool:
        return not isinstance(exc_or_state, UnpicklableResultError) and await super().can_retry(exc_or_state)


def run_sync(
    task: Task[Any, Any], task_run_id: Any, dependencies: Any, task_run: Any = None, **arguments: Any
) -> State[Any]:
    """As `prefect.task_engine.run_task_sync`, for a state; see that for the arguments."""
    engine = _SyncEngine(task=task, task_run=task_run, **arguments)
    with engine.start(task_run_id=task_run_id, dependencies=dependencies):
        while engine.is_running():
            engine.wait_until_ready()
            with engine.asset_context(), engine.run_context(), engine.transaction_context() as transaction:
                engine.call_task_fn(transaction)
            stop_if_suspended()
    return engine.state


async def run_async(
    task: Task[Any, Any], task_run_id: Any, dependencies: Any, task_run: Any = None, **arguments: Any
) -> State[Any]:
    """As `prefect.task_engine.run_task_async`, for a state; see that for the arguments."""
    engine = _AsyncEngine(task=task, task_run=task_run, **arguments)
    async with engine.start(task_run_id=task_run_id, dependencies=dependencies):
        while engine.is_running():
            await engine.wait_until_ready()
            async with engine.asset_context(), engine.run_context(), engine.transaction_context() as transaction:
                await engine.call_task_fn(transaction)
            stop_if_suspended()
    return engine.state


def final_state(task: Task[Any, Any], state: State[Any]) -> State[Any]:
    """A task run's state as it leaves the worker; what cannot be pickled in one that did not complete is left out."""
    data = data_of(state)
    if not (state.is_completed() or isinstance(data, BaseException)):
        reason = why_unpicklable(data)
        if reason is not None:
            put_data(state, UnpicklableResultError(_refusal(task, data, reason)))
    return portable(state)
