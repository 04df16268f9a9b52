"""Large states that this process holds, as Dask data for tasks that need them: sent once, urgent, not kept for ever."""

from __future__ import annotations

import time
from concurrent import futures
from pathlib import Path
from typing import Any

import dask
import pytest
from prefect import flow, task
from prefect.utilities.annotations import unmapped

from prefect_htcdask import HTCDaskTaskRunner
from prefect_htcdask.runner.client import graph
from prefect_htcdask.runner.submit import large_states, submitter
from prefect_htcdask.runner.submit.large_states import LIMIT
from tests.support.this_flow import client_of_this_flow, graphs, run_of_this_flow
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("prefect_api")


@task
def of_size(size: int) -> bytes:
    return bytes(size)


@task
def length(value: bytes) -> int:
    return len(value)


@task
def noted(directory: Path, name: str, value: Any = None) -> str:
    time.sleep(0.1)
    with (directory / "order").open("a") as stream:
        stream.write(f"{name}\n")
    return name


@task
def gate(directory: Path, number: int) -> None:
    (directory / f"{number}.begun").touch()
    while not (directory / "go").exists():
        time.sleep(0.02)


def scheduler_of_this_flow() -> Any:
    return client_of_this_flow().cluster.scheduler


def in_hand(count: int, size: int = 2 * LIMIT) -> list[Any]:
    large = [of_size.submit(size + number) for number in range(count)]
    for future in large:
        future.result()
    return large


def test_small_ones_go_along(runner: HTCDaskTaskRunner) -> None:
    @flow(task_runner=runner)
    def computing() -> tuple[int, int]:
        (small,) = in_hand(1, 1000)
        return length.submit(small).result(), len(client_of_this_flow().held_states)

    assert computing() == (1000, 0)


def test_they_stay_for_calls_to_come_up_to_a_bound(runner: HTCDaskTaskRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_states, "KEPT", 5 * LIMIT)

    @flow(task_runner=runner)
    def computing() -> None:
        large = in_hand(4)
        client = client_of_this_flow()
        sent: list[list[str]] = []
        for future in [large[0], large[0], large[1], large[0], large[2]]:
            assert length.submit(future).result() >= 2 * LIMIT
            sent.append(list(client.held_states))
        assert [len(keys) for keys in sent[:4]] == [1, 1, 2, 2], "sent again"
        # The one that was not used for longest.
        dropped = sent[2][1]
        wait_until(lambda: dropped not in client.held_states and dropped not in client.futures, 20, "it is let go")
        assert sent[0][0] in client.held_states
        # All that tasks need is there, however much; it is let go with them.
        assert length.map([*large, *large]).result() == [2 * LIMIT + number for number in range(4)] * 2
        wait_until(lambda: len(client.held_states) <= 2, 20, "no more than may be kept")

    computing()


def test_one_for_all_calls_of_a_map(runner: HTCDaskTaskRunner) -> None:
    @flow(task_runner=runner)
    def computing() -> tuple[list[Any], int]:
        (large,) = in_hand(1)
        return both.map(range(5), unmapped([large])).result(), len(client_of_this_flow().held_states)

    found, sent = computing()
    assert found == [number + 2 * LIMIT for number in range(5)] and sent == 1


@task
def both(number: int, values: list[bytes]) -> int:
    return number + len(values[0])


def test_an_urgent_task_does_not_wait_for_its_argument(runner: HTCDaskTaskRunner, tmp_path: Path) -> None:
    """Nor does it lose the annotations that are its own."""

    @flow(task_runner=runner)
    def computing() -> int:
        (large,) = in_hand(1)
        tasks = scheduler_of_this_flow().tasks
        threads = sum(client_of_this_flow().nthreads().values())
        gates = [gate.submit(tmp_path, number) for number in range(threads)]
        wait_until(lambda: len(list(tmp_path.glob("*.begun"))) == threads, 30, "every thread is busy")
        plain = [noted.submit(tmp_path, f"plain {number}") for number in range(10 * threads)]
        with dask.annotate(priority=10):
            urgent = noted.submit(tmp_path, "urgent", large)
        client_of_this_flow().submit_buffer.flush()
        wait_until(lambda: urgent.wrapped_future.key in tasks, 20, "it is there")
        assert tasks[urgent.wrapped_future.key].priority[0] == -10
        (tmp_path / "go").touch()
        for future in [*gates, *plain, urgent]:
            future.result()
        return threads

    threads = computing()
    order = (tmp_path / "order").read_text().splitlines()
    # Those that the workers had been given already may come first.
    assert order.index("urgent") <= 6 * threads, order


def test_it_goes_to_the_workers_that_its_task_is_for(runner: HTCDaskTaskRunner) -> None:
    """Another group may have no worker, and none to come."""

    @flow(task_runner=runner)
    def computing() -> None:
        (large,) = in_hand(1)
        client = client_of_this_flow()
        with dask.annotate(resources={"GPU": 1}):
            waits = length.submit(large)
        client.submit_buffer.flush()
        (key,) = client.held_states
        tasks = scheduler_of_this_flow().tasks
        wait_until(lambda: key in tasks, 20, "it is there")
        assert tasks[key].resource_restrictions == {"GPU": 1}
        client.cancel([waits.wrapped_future])
        waits.wait()

    computing()


@task
def first_byte(value: bytes, more: bytes = b"") -> int:
    return value[0]


def test_a_map_of_large_arguments_goes_in_several_graphs(
    runner: HTCDaskTaskRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submitter, "MAP_BYTES", 100_000)

    @flow(task_runner=runner)
    def computing() -> tuple[list[int], list[int]]:
        first_byte.submit(b"x").result()
        with graphs() as sizes:
            mapped = first_byte.map([bytes([number]) * 40_000 for number in range(10)])
        return list(sizes), mapped.result()

    sizes, found = computing()
    assert sizes == [3, 3, 3, 1] and found == list(range(10))


def test_what_waits_at_the_scheduler_is_bounded(runner: HTCDaskTaskRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond that it is Dask data, which goes with the tasks that need it; what is there already stays in use."""
    monkeypatch.setattr(submitter, "METADATA_TOTAL", 400_000)

    @flow(task_runner=runner)
    def computing() -> list[int]:
        of: list[int] = []
        first_byte.submit(b"x").result()
        for number in [0, 1, 2, 3, 0]:
            with graphs() as sizes:
                first_byte.map([b"x"] * 2, more=unmapped(bytes([number]) * 150_000)).result()
            of += sizes
        with graphs() as sizes:
            first_byte.map([b"x"] * 2, more=unmapped(b"few")).result()
        return of + list(sizes)

    # A node more than tasks where the shared argument is one.
    assert computing() == [2, 2, 3, 3, 2, 2]


def test_it_serves_tasks_of_other_resources_from_a_place_of_its_own(runner: HTCDaskTaskRunner) -> None:
    """One that waits for a GPU is of no use to a task that needs none."""

    @flow(task_runner=runner)
    def computing() -> int:
        (large,) = in_hand(1)
        with dask.annotate(resources={"GPU": 1}):
            waits = length.submit(large)
        found = length.submit(large).result(timeout=60)
        assert len(client_of_this_flow().held_states) == 2
        client_of_this_flow().cancel([waits.wrapped_future])
        waits.wait()
        return found

    assert computing() == 2 * LIMIT


def test_nothing_is_held_while_the_connection_is_waited_for(runner: HTCDaskTaskRunner) -> None:
    """Other flow runs of this process send what they have."""

    @flow(task_runner=runner)
    def computing() -> int:
        (large,) = in_hand(1)
        client = client_of_this_flow()
        with futures.ThreadPoolExecutor(1) as pool, client._sending:
            states = run_of_this_flow().submitter._large_states
            sending = pool.submit(states.upload, large.pending_result, None)
            wait_until(states._lock.locked, 20, "it is being sent")
            assert not futures.wait([sending], timeout=0.2).done
            assert graph._configuring.acquire(timeout=5), "it waits, and so does everybody else"
            graph._configuring.release()
        return length.submit(large).result()

    assert computing() == 2 * LIMIT


def test_what_is_changed_later_is_not_sent_again(runner: HTCDaskTaskRunner) -> None:
    @flow(task_runner=runner)
    def computing() -> list[int]:
        many = numbers.submit(LIMIT)
        result = many.result()
        first = total.submit(many).result()
        result[0] = 1_000_000
        return [first, total.submit(many).result()]

    first, second = computing()
    assert first == second


@task
def numbers(count: int) -> list[int]:
    return list(range(count))


@task
def total(values: list[int]) -> int:
    return sum(values)
