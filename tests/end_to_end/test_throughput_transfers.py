"""Large arguments and results: how often do they cross the wire? Every connection passes a proxy that counts."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import dask
import distributed
import numpy as np
import pytest
from prefect import flow, task
from prefect.runtime import flow_run
from prefect.utilities.annotations import unmapped

from prefect_htcdask import HTCDaskTaskRunner
from tests.support.counting_proxy import Traffic, counting_proxy
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("prefect_api")

MB = 1_000_000
ARRAY = int(os.environ.get("HTCDASK_TEST_ARRAY_MB", "20")) * MB
"""Bytes of the large argument; more than waits at the scheduler (`submission.METADATA_LIMIT`)."""
TASKS = 100
RESULT = 1 * MB


@dataclass
class Pool:
    """A scheduler with two workers in processes of their own.

    Attributes:
        client: a client that passes by no proxy.
        to_scheduler: what clients that connect to its address exchange with the scheduler.
        of_workers: what the workers exchange with the scheduler.
    """

    client: distributed.Client
    to_scheduler: Traffic
    of_workers: Traffic

    def from_workers(self) -> int:
        """Bytes of data that workers have sent in all, to each other or as results, by Dask's own count."""
        return sum(self.client.run(lambda dask_worker: dask_worker.transfer_outgoing_bytes_total).values())


@pytest.fixture(scope="module")
def pool(prefect_server: Any) -> Iterator[Pool]:
    with ExitStack() as stack:
        scheduler = stack.enter_context(distributed.LocalCluster(n_workers=0, processes=True, dashboard_address=None))
        of_workers = stack.enter_context(counting_proxy(scheduler.scheduler_address))
        to_scheduler = stack.enter_context(counting_proxy(scheduler.scheduler_address))
        client = stack.enter_context(distributed.Client(scheduler.scheduler_address, set_as_default=False))
        options = ["--no-nanny", "--nthreads", "1", "--no-dashboard", "--host", "127.0.0.1", "--memory-limit", "0"]
        for _ in range(2):
            worker = subprocess.Popen(
                [sys.executable, "-m", "dask", "worker", of_workers.address, *options],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(worker.wait, 20)
            stack.callback(worker.terminate)
        client.wait_for_workers(2, timeout=60)
        made = Pool(client, to_scheduler, of_workers)
        POOLS.append(made)
        yield made
        POOLS.remove(made)


POOLS: list[Pool] = []


def the_pool() -> Pool:
    """The pool; by a function, since what a flow's own function names by itself travels with the flow."""
    return POOLS[0]


@functools.cache
def the_array() -> Any:
    """The large argument, likewise."""
    return np.random.default_rng(1).integers(0, 256, ARRAY, dtype=np.uint8)


@task
def first_and_process(number: int, array: Any) -> tuple[int, int]:
    import os
    import time

    time.sleep(0.05)  # long enough for the other worker to have its share
    return int(array[number]), os.getpid()


@task
def large(number: int) -> bytes:
    return bytes([number % 256]) * RESULT


@task
def length(value: bytes) -> int:
    return len(value)


def until_both_take_part(few: Callable[[], list[tuple[int, int]]]) -> None:
    """Both workers are connected and have the code then: one that still imports Prefect leaves all to the other."""
    for _ in range(20):
        if len({process for _, process in few()}) == 2:
            break


def crossing(all_tasks: Callable[[], list[tuple[int, int]]]) -> dict[str, Any]:
    """What tasks answer, and the bytes that they make the client send and the workers fetch."""
    pool = the_pool()
    client, workers, data = pool.to_scheduler.now(), pool.of_workers.now(), pool.from_workers()
    return {
        "answers": all_tasks(),
        "sent": pool.to_scheduler.since(client)[0],
        "fetched": pool.of_workers.since(workers)[1] + pool.from_workers() - data,
    }


@flow
def one_map() -> dict[str, Any]:
    array = the_array()
    until_both_take_part(lambda: first_and_process.map(range(4), array=unmapped(array[:10])).result())
    return crossing(lambda: first_and_process.map(range(TASKS), array=unmapped(array)).result())


def test_a_large_shared_argument_is_sent_once_to_each_worker(pool: Pool, recwarn: pytest.WarningsRecorder) -> None:
    seen = one_map.with_options(task_runner=HTCDaskTaskRunner(address=pool.to_scheduler.address))()
    assert [value for value, _ in seen["answers"]] == [int(value) for value in the_array()[:TASKS]]
    assert len({process for _, process in seen["answers"]}) == 2, "one worker alone had all the tasks"
    assert ARRAY <= seen["sent"] < 1.1 * ARRAY
    assert 2 * ARRAY <= seen["fetched"] < 2.1 * ARRAY
    # Dask would say to send it once; what is sent with each call it still warns of.
    assert not [warning for warning in recwarn if "large graph" in str(warning.message)]
    assert dask.config.get("distributed.admin.large-graph-warning-threshold") == "10MB"


@task
def an_array(size: int) -> Any:
    return the_array()[:size]


def of_each(count: int, array: Any) -> list[tuple[int, int]]:
    futures = [first_and_process.submit(number, array) for number in range(count)]
    return [future.result() for future in futures]


@flow
def one_result_for_many_submits() -> dict[str, Any]:
    few = an_array.submit(1000)
    few.result()
    until_both_take_part(lambda: of_each(4, few))
    array = an_array.submit(ARRAY)
    assert len(array.result()) == ARRAY
    return crossing(lambda: of_each(TASKS, array))


def test_a_large_result_in_hand_is_sent_once_for_many_submits(pool: Pool, recwarn: pytest.WarningsRecorder) -> None:
    seen = one_result_for_many_submits.with_options(task_runner=HTCDaskTaskRunner(address=pool.to_scheduler.address))()
    assert [value for value, _ in seen["answers"]] == [int(value) for value in the_array()[:TASKS]]
    assert len({process for _, process in seen["answers"]}) == 2, "one worker alone had all the tasks"
    assert ARRAY <= seen["sent"] < 1.1 * ARRAY
    # The second worker may have it of the first.
    assert ARRAY <= seen["fetched"] < 2.2 * ARRAY
    assert not [warning for warning in recwarn if "large graph" in str(warning.message)]


@task
def of_the_flow(number: int) -> int:
    return int(flow_run.parameters["array"][number])


@flow
def with_a_large_parameter(array: Any) -> dict[str, Any]:
    traffic = the_pool()
    client, workers = traffic.to_scheduler.now(), traffic.of_workers.now()
    kinds = [of_the_flow.with_options(name=f"of the flow {number}") for number in range(4)]
    answers = [future.result() for future in [kind.submit(number) for number, kind in enumerate(kinds * 5)]]
    return {
        "answers": answers,
        "sent": traffic.to_scheduler.since(client)[0],
        "fetched": traffic.of_workers.since(workers)[1],
    }


def test_a_flow_s_large_parameter_is_sent_once_for_all_of_its_tasks(pool: Pool) -> None:
    runner = HTCDaskTaskRunner(address=pool.to_scheduler.address)
    seen = with_a_large_parameter.with_options(task_runner=runner, validate_parameters=False)(the_array())
    assert seen["answers"] == [int(value) for value in the_array()[:20]]
    assert ARRAY <= seen["sent"] < 1.2 * ARRAY
    assert seen["fetched"] < 2.2 * ARRAY


@flow
def many_results() -> dict[str, Any]:
    traffic = the_pool().to_scheduler
    large.map(range(2)).wait()
    seen: dict[str, Any] = {}
    before = traffic.now()
    futures: Any = large.map(range(TASKS))
    wait_until(lambda: not any(future.is_pending() for future in futures), 60, "every task run has ended")
    # Others may use them where they are.
    seen["lengths"] = length.map(futures).result()
    seen["unasked"] = traffic.since(before)
    seen["one"] = futures[3].result()
    seen["of one"] = traffic.since(before)
    seen["all"] = futures.result()
    seen["of all"] = traffic.since(before)
    return seen


def test_large_results_stay_on_the_workers_until_they_are_asked_for(pool: Pool) -> None:
    seen = many_results.with_options(task_runner=HTCDaskTaskRunner(address=pool.to_scheduler.address))()
    assert seen["lengths"] == [RESULT] * TASKS
    assert seen["all"] == [bytes([number % 256]) * RESULT for number in range(TASKS)]
    assert seen["one"] == seen["all"][3]
    assert seen["unasked"][1] < RESULT
    assert RESULT <= seen["of one"][1] - seen["unasked"][1] < 2 * RESULT
    assert TASKS * RESULT <= seen["of all"][1] < 1.1 * TASKS * RESULT
    assert seen["of all"][0] < RESULT, "a result was sent back to be used"
