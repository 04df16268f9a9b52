"""Flow runs whose tasks return or raise what pickle refuses: the flow and the Prefect API say the same."""

from __future__ import annotations

import queue
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import dask
import pytest
from prefect import allow_failure, flow, get_client, task
from prefect.client.schemas.objects import State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.futures import as_completed, wait
from prefect.states import Failed

from prefect_htcdask import HTCDaskTaskRunner
from prefect_htcdask.errors import UnpicklableResultError
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("prefect_api")


class TwoArguments(Exception):
    """Pickles and cannot be unpickled: its constructor takes other arguments than Exception keeps."""

    def __init__(self, code: int, detail: str) -> None:
        super().__init__(f"{code}: {detail}")


class HoldsLock(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class BadUnpickle:
    def __reduce__(self) -> Any:
        return _refuse, ()


def _refuse() -> None:
    raise RuntimeError("this value refuses to be unpickled")


@task
def raises_two() -> None:
    raise TwoArguments(404, "no such dataset")


@task
async def raises_lock() -> None:
    raise HoldsLock("the detector is locked")


@task
def chained() -> None:
    try:
        raise TwoArguments(1, "inner")
    except TwoArguments as exc:
        raise ValueError("outer") from exc


@task(retries=3)
def a_queue() -> Any:
    return queue.Queue()


@task
async def a_lock() -> Any:
    return [threading.Lock()]


@task
def failed_with_lock() -> Any:
    return Failed(message="as it wishes", data=threading.Lock())


@task
def bad_unpickle() -> BadUnpickle:
    return BadUnpickle()


@task
def a_lambda() -> Any:
    return lambda x: x + 1


@task
def take(x: Any) -> str:
    return type(x).__name__


def in_api(future: Any, kind: StateType) -> State[Any]:
    """The state that the API has, once it is of this kind."""
    found: list[State[Any]] = []

    def reached() -> bool:
        with get_client(sync_client=True) as api, suppress(ObjectNotFound):
            found[:] = [state for state in [api.read_task_run(future.task_run_id).state] if state is not None]
        return bool(found) and found[0].type is kind

    wait_until(reached, 60, f"the API having {kind}")
    return found[0]


def test_exceptions_arrive_as_what_they_are(runner: HTCDaskTaskRunner) -> None:
    @flow(task_runner=runner)
    def failing() -> list[Any]:
        told = []
        for one in (raises_two, raises_lock, chained):
            future = one.submit()
            downstream = take.submit(allow_failure(future))
            told.append((one, future.result(raise_on_failure=False), future.state, in_api(future, StateType.FAILED)))
            assert downstream.result(timeout=60) == type(told[-1][1]).__name__
            with pytest.raises(type(told[-1][1])):
                future.result(timeout=60)
            again = take.submit(allow_failure(future))  # of the state that is here
            assert again.result(timeout=60) == type(told[-1][1]).__name__
        return told

    for one, exc, state, known in failing():
        assert state.type is StateType.FAILED and state.message == known.message and str(exc) in state.message
        tb = exc.__traceback__
        while tb.tb_next is not None:
            tb = tb.tb_next
        assert tb.tb_frame.f_code.co_name == one.fn.__name__
        if one is chained:
            assert isinstance(exc.__cause__, TwoArguments) and str(exc.__cause__) == "1: inner"


def test_a_result_that_cannot_be_pickled_fails_its_task_run_for_flow_and_api_alike(
    runner: HTCDaskTaskRunner,
) -> None:
    @flow(task_runner=runner)
    def failing() -> None:
        for one, kind in ((a_queue, "queue.Queue"), (a_lock, "builtins.list")):
            future = one.submit()
            downstream = take.submit(future)
            with pytest.raises(
                UnpicklableResultError, match=f"result of task '{one.name}', a {kind}, cannot be pickled"
            ):
                future.result(timeout=60)
            known = in_api(future, StateType.FAILED)
            assert future.state.type is StateType.FAILED and future.state.message == known.message
            downstream.wait(60)
            assert downstream.state.name == "NotReady"
            with get_client(sync_client=True) as api:
                assert api.read_task_run(future.task_run_id).run_count == 1  # it would come to the same
        future = failed_with_lock.submit()
        assert isinstance(future.result(timeout=60, raise_on_failure=False), UnpicklableResultError)
        assert future.state.is_failed() and future.state.message == "as it wishes"
        in_api(future, StateType.FAILED)
        assert take.submit(1).result() == "int"

    failing()


def test_a_result_that_cannot_be_unpickled_fails_its_task_run_for_flow_and_api_alike(
    runner: HTCDaskTaskRunner, local_pool: Any
) -> None:
    here, there = (worker.worker_address for worker in local_pool.workers.values())

    @flow(task_runner=runner)
    def failing() -> int:
        with dask.annotate(workers=[here]):
            future = bad_unpickle.submit()
        with dask.annotate(workers=[there]):
            elsewhere = take.submit(future)
            allowed = take.submit(allow_failure(future))
        assert allowed.result(timeout=60) == "UnpicklableResultError"
        elsewhere.wait(60)
        assert elsewhere.state.name == "NotReady"
        mixed = [future, take.submit(1), raises_two.submit()]
        assert sorted(one.state.name for one in as_completed(mixed, timeout=60)) == ["Completed", "Failed", "Failed"]
        assert wait(mixed, timeout=60).not_done == set()
        with pytest.raises(UnpicklableResultError, match="RuntimeError: this value refuses to be unpickled"):
            future.result()
        assert in_api(future, StateType.FAILED).message == future.state.message
        return 1

    assert failing() == 1


def test_what_pickle_takes_or_cloudpickle_does_arrives(runner: HTCDaskTaskRunner, tmp_path: Path) -> None:
    @flow(task_runner=runner)
    def working() -> Any:
        return a_lambda.submit().result()(1), take.submit(a_lambda.submit()).result()

    assert working() == (2, "function")
