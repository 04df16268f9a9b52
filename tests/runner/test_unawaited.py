"""Futures that nobody awaited as the flow ends: `ThreadPoolTaskRunner` is the judge of what becomes of the flow run."""

from __future__ import annotations

import ctypes
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import distributed
import pytest
from prefect import flow, get_client, task
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.runtime import flow_run as flow_run_runtime
from prefect.states import Completed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from prefect_htcdask import HTCDaskTaskRunner
from prefect_htcdask.runner import flow_run
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("prefect_api")

WITHIN = 10.0
"""Seconds after the flow's end in which Prefect's server records what it was told."""


@task
def double(x: int) -> int:
    return 2 * x


@task
def fails(x: int = 0) -> int:
    raise ValueError(f"no luck with {x}")


@task
def odd(x: int) -> int:
    if x % 2:
        raise ValueError(f"{x} is odd")
    return x


@task
def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def never_awaits_a_failure() -> str:
    fails.submit()
    # It has started when the flow ends, on any runner.
    time.sleep(1.5)
    return "done"


def never_awaits_slow_tasks() -> str:
    for _ in range(2):
        nap.submit(2.5)
    time.sleep(1.5)
    return "done"


@task
def keeps_the_lock(seconds: int, begun: Path) -> int:
    begun.touch()
    # PyDLL keeps the interpreter's lock: this worker answers nobody meanwhile.
    return int(ctypes.PyDLL(None).sleep(seconds))


def leaves_tasks_queued() -> str:
    for _ in range(8):
        nap.submit(2.5)
    time.sleep(1.5)
    return "done"


def never_awaits_a_map() -> str:
    odd.map(range(6)).wait()
    odd.map(range(2))
    time.sleep(1.5)
    return "done"


def returns_futures() -> Any:
    return [double.submit(1), double.submit(2)]


def returns_a_future_that_fails() -> Any:
    return [double.submit(1), fails.submit()]


def returns_a_map() -> Any:
    return odd.map(range(4))


def returns_none() -> None:
    double.submit(1).wait()
    fails.submit().wait()


def returns_a_state_of_its_own() -> Any:
    fails.submit().wait()
    return Completed(message="all the same")


def raises_meanwhile() -> None:
    nap.submit(2.5)
    time.sleep(1.5)
    raise RuntimeError("the flow itself")


FLOWS: list[Callable[[], Any]] = [
    never_awaits_a_failure,
    never_awaits_slow_tasks,
    leaves_tasks_queued,
    never_awaits_a_map,
    returns_futures,
    returns_a_future_that_fails,
    returns_a_map,
    returns_none,
    returns_a_state_of_its_own,
    raises_meanwhile,
]


@pytest.fixture
def outcome() -> Iterator[Callable[[Callable[[], Any], TaskRunner[Any]], tuple[Any, ...]]]:
    """Runs a flow with a runner; gives the flow run's state and how many task runs are in which state at last.

    The flow runs are deleted afterwards: what another runner leaves Running is no other test's business.
    """
    ids: list[UUID] = []

    def run(body: Callable[[], Any], runner: TaskRunner[Any]) -> tuple[Any, ...]:
        @flow(name=body.__name__, task_runner=runner)
        def computing() -> Any:
            ids.append(UUID(str(flow_run_runtime.id)))
            return body()

        told = computing(return_state=True)
        with get_client(sync_client=True) as client:
            of_flow = FlowRunFilter(id=FlowRunFilterId(any_=[ids[-1]]))
            deadline = time.monotonic() + WITHIN
            while True:
                states = [one.state for one in client.read_task_runs(flow_run_filter=of_flow)]
                if all(state is not None and state.is_final() for state in states) or time.monotonic() > deadline:
                    break
                time.sleep(0.25)
            recorded = client.read_flow_run(ids[-1]).state
        assert recorded is not None and (recorded.type, recorded.name) == (told.type, told.name)
        return told.type.value, told.name, Counter(state.name if state else "none" for state in states)

    yield run
    with get_client(sync_client=True) as client:
        for flow_run_id in ids:
            client.delete_flow_run(flow_run_id)


@pytest.mark.parametrize("body", FLOWS, ids=lambda body: body.__name__)
def test_the_flow_run_ends_as_with_threads(
    body: Callable[[], Any], outcome: Callable[..., tuple[Any, ...]], local_pool: distributed.LocalCluster
) -> None:
    """Two tasks at a time with each runner: two threads, or two workers of one thread."""
    judge = outcome(body, ThreadPoolTaskRunner(max_workers=2))  # type: ignore[no-untyped-call]
    ours = outcome(body, HTCDaskTaskRunner(cluster=local_pool))
    assert ours == judge
    assert not {"Running", "Pending", "none"} & set(ours[2])


def test_a_running_task_that_keeps_the_interpreter_s_lock_is_waited_for(
    outcome: Callable[..., tuple[Any, ...]], local_pool: distributed.LocalCluster, tmp_path: Path
) -> None:
    """Its worker cannot say that it runs; the flow's end waits for that answer, and does not take it for a no."""

    def leaves_it() -> str:
        double.map([1, 2]).wait()  # the workers have imported Prefect
        keeps_the_lock.submit(int(flow_run.ANSWER) + 3, tmp_path / "begun")
        wait_until((tmp_path / "begun").exists, 30, "the task has begun")
        return "done"

    ended = outcome(leaves_it, HTCDaskTaskRunner(cluster=local_pool))
    assert ended == ("COMPLETED", "Completed", Counter(Completed=3))


def test_who_waits_in_another_thread_hears_of_what_is_cancelled_as_the_flow_ends(runner: HTCDaskTaskRunner) -> None:
    ended: list[UUID] = []
    submitted: list[UUID] = []

    @flow(task_runner=runner)
    def leaves() -> str:
        for _ in range(8):
            future = nap.submit(2.5)
            future.add_done_callback(lambda one: ended.append(one.task_run_id))
            submitted.append(future.task_run_id)
        return "done"

    assert leaves() == "done"
    wait_until(lambda: sorted(ended) == sorted(submitted), WITHIN, "all callbacks are called, once")
