"""Submits that follow one another closely: one graph, in order, and nothing of it lost or overtaken."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import Any

import dask
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect import flow, task
from prefect.client.schemas.objects import StateType
from prefect.runtime import flow_run
from prefect.states import Completed

from prefect_htcdask import HTCDaskTaskRunner
from prefect_htcdask.runner import flow_run as sessions
from prefect_htcdask.runner.client import submit_buffer, task_spec
from tests.support.marked_tasks import marked, runs
from tests.support.this_flow import client_of_this_flow, graphs
from tests.support.waiting import wait_until
from tests.support.wire import PATIENCE, Wire

pytestmark = pytest.mark.usefixtures("prefect_api")

NEVER = 3600.0
"""Seconds; long enough for nothing to leave by itself."""


@task
def nothing(x: Any) -> Any:
    return x


@task
def one_more(x: int) -> int:
    return x + 1


def hold_back() -> None:
    """From the next submit but one on nothing leaves the outbox by itself."""
    nothing.submit(0).result(timeout=PATIENCE)
    client_of_this_flow().submit_buffer.interval = NEVER
    client_of_this_flow().submit_buffer._sent_at = time.monotonic()


def test_a_loop_of_submits_needs_few_graphs(runner: HTCDaskTaskRunner) -> None:
    count = 200

    @flow(task_runner=runner)
    def computing() -> tuple[list[int], list[int]]:
        nothing.submit(0).wait()
        with graphs() as sizes:
            futures = [nothing.submit(x) for x in range(count)]
            found = [future.result(timeout=PATIENCE) for future in futures]
        return found, sizes

    found, sizes = computing()
    print(f"graphs of {sizes}")
    assert found == list(range(count))
    assert sum(sizes) == count and len(sizes) <= count / 2


def test_one_submit_alone_waits_for_nothing(runner: HTCDaskTaskRunner) -> None:
    @flow(task_runner=runner)
    def computing() -> int:
        nothing.submit(0).wait()
        # As if the last graph had been sent long ago.
        client_of_this_flow().submit_buffer._sent_at = -math.inf
        client_of_this_flow().submit_buffer.interval = NEVER
        with graphs() as sizes:
            future = one_more.submit(1)
            assert sizes == [1]
        result: int = future.result(timeout=PATIENCE)
        return result

    assert computing() == 2


@pytest.mark.parametrize("how", ["result", "callback"])
def test_what_somebody_asks_for_leaves_at_once_with_all_that_waits(runner: HTCDaskTaskRunner, how: str) -> None:
    @flow(task_runner=runner)
    def computing() -> None:
        hold_back()
        first, second, third = (nothing.submit(number) for number in range(3))
        with graphs() as sizes:
            if how == "result":
                assert second.result(timeout=PATIENCE) == 1
            else:
                heard: list[Any] = []
                second.add_done_callback(heard.append)
                wait_until(lambda: heard == [second], PATIENCE, "it is called back")
            assert sizes == [3]
        assert first.result(timeout=PATIENCE) + third.result(timeout=PATIENCE) == 2

    computing()


def test_a_chain_of_submits_keeps_its_order(runner: HTCDaskTaskRunner) -> None:
    @flow(task_runner=runner)
    def computing() -> int:
        future = nothing.submit(0)
        for _ in range(40):
            future = one_more.submit(future)
        return future.result(timeout=PATIENCE)

    assert computing() == 40


def test_annotations_are_those_of_the_submit(runner: HTCDaskTaskRunner) -> None:
    @flow(task_runner=runner)
    def computing() -> tuple[list[int], list[dict[str, Any]]]:
        hold_back()
        for priority in (1, 1, 5):
            with dask.annotate(priority=priority):
                nothing.submit(priority)
        # Whoever sends them has annotations of his own.
        with graphs() as sizes, dask.annotate(priority=9, resources={"GPU": 1}):
            client_of_this_flow().submit_buffer.flush()
        return list(sizes), sizes.annotations

    assert computing() == ([2, 1], [{"priority": 1}, {"priority": 5}])


@pytest.mark.parametrize("how", ["map", "dask", "delayed"])
def test_what_depends_on_a_submit_comes_after_it(runner: HTCDaskTaskRunner, how: str) -> None:
    @flow(task_runner=runner)
    def computing() -> Any:
        hold_back()
        first = nothing.submit(1)
        if how == "map":
            return one_more.map([first]).result(timeout=PATIENCE)
        client = client_of_this_flow()
        if how == "dask":
            state = client.submit(lambda state: state, first.wrapped_future, pure=False).result(timeout=PATIENCE)
        else:
            (state,) = dask.compute(dask.delayed(lambda state: state)(first.wrapped_future), scheduler=client)
        return [state.data.result + 1]

    assert computing() == [2]


@pytest.mark.parametrize("how", ["client", "flow"])
def test_what_is_cancelled_before_it_left_never_leaves(runner: HTCDaskTaskRunner, tmp_path: Path, how: str) -> None:
    @flow(task_runner=runner)
    def computing() -> Any:
        hold_back()
        futures = [marked.submit(tmp_path, f"{number}") for number in range(3)]
        dependent = marked.submit(tmp_path, "dependent", wait_for=[futures[0]])
        with graphs() as sizes:
            if how == "flow":
                its_run = sessions.find(str(flow_run.id))
                assert its_run is not None
                its_run.cancel()
            else:
                client_of_this_flow().cancel([future.wrapped_future for future in futures])
            client_of_this_flow().submit_buffer.flush()
        assert all(future.wrapped_future.cancelled() for future in futures)
        assert sizes == ([] if how == "flow" else [1])
        dependent.wait(timeout=PATIENCE)
        return Completed(data=dependent.state.type)

    assert computing() in (StateType.CANCELLED, StateType.CRASHED)
    assert not any(runs(tmp_path, name) for name in ("0", "1", "2", "dependent"))


def test_a_flow_that_ends_sends_what_waits_before_it_looks_what_runs(
    runner: HTCDaskTaskRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    waiting: list[int] = []
    settle = sessions.cancel_or_wait

    def noted(client: Any, *args: Any) -> None:
        waiting.append(len(client.submit_buffer._waiting))
        settle(client, *args)

    monkeypatch.setattr(sessions, "cancel_or_wait", noted)

    @flow(task_runner=runner)
    def computing() -> None:
        hold_back()
        for number in range(2):
            marked.submit(tmp_path, f"{number}")
        waiting.append(len(client_of_this_flow().submit_buffer._waiting))

    computing()
    assert waiting == [2, 0]


def test_what_waits_as_the_connection_breaks_runs_once(wire: Wire, tmp_path: Path) -> None:
    @flow(task_runner=HTCDaskTaskRunner(address=wire.address))
    def computing() -> Any:
        hold_back()
        client = client_of_this_flow()
        with graphs() as sizes:
            future = marked.submit(tmp_path, "waits")
            assert not wire.has(future)
            wire.cut()
            wait_until(lambda: client.status == "connecting", PATIENCE, "the loss is noticed")
            wire.mend()
            result = future.result(timeout=PATIENCE)
            client.submit_buffer.flush()
        assert sizes == [1]
        return result

    computing()
    assert len(runs(tmp_path, "waits")) == 1


def test_what_cannot_be_sent_fails_alone(runner: HTCDaskTaskRunner) -> None:
    """A client that refuses a graph, which no fault of the network brings about."""

    @flow(task_runner=runner)
    def computing() -> Any:
        hold_back()
        client = client_of_this_flow()
        to_futures = client._graph_to_futures

        def refuse(graph: Any, keys: list[Any], *args: Any, **kwargs: Any) -> Any:
            if str(refused.wrapped_future.key) in keys:
                raise RuntimeError("no such graph")
            return to_futures(graph, keys, *args, **kwargs)

        refused = nothing.submit(1)
        with dask.annotate(priority=1):
            other = nothing.submit(2)
        client._graph_to_futures = refuse
        try:
            refused.wait(timeout=PATIENCE)
        finally:
            del client._graph_to_futures
        said = refused.state.type, refused.state.message
        return Completed(data=(said, other.result(timeout=PATIENCE)))

    (kind, message), other = computing()
    assert kind == StateType.CRASHED and "no such graph" in message
    assert other == 2


def test_much_is_not_held_back(runner: HTCDaskTaskRunner) -> None:
    @flow(task_runner=runner)
    def computing() -> list[int]:
        hold_back()
        with graphs() as sizes:
            for _ in range(4):
                nothing.submit(b"x" * (submit_buffer.MOST_BYTES // 2))
        return list(sizes)

    assert computing() == [2, 2]


SPECS = st.lists(st.tuples(st.sets(st.integers(0, 9)), st.booleans()), max_size=10)


@given(SPECS, st.sets(st.integers(0, 9)))
def test_what_needs_a_lost_task_takes_no_other_with_it(drawn: list[tuple[set[int], bool]], lost: set[int]) -> None:
    options = (task_spec.NO_OPTIONS, task_spec.SendOptions({"priority": 1}, None))
    specs: list[task_spec.TaskSpec] = []
    for number, (needed, other) in enumerate(drawn):
        upstreams = tuple(specs[one] if one < number else f"elsewhere-{one}" for one in sorted(needed))
        spec = task_spec.TaskSpec(f"task-{number}", ("run",), b"", None, upstreams)
        spec.options = options[other]
        specs.append(spec)

    def is_there(key: str) -> bool:
        return not key.startswith("elsewhere") or int(key.rpartition("-")[2]) not in lost

    graphs = list(submit_buffer.graph_batches(specs, is_there))
    assert [spec for graph in graphs for spec in graph] == specs
    doomed: set[str] = set()
    for graph in graphs:
        assert all(spec.options == graph[0].options for spec in graph)
        for spec in graph:
            if any(key in doomed or not is_there(key) for key in spec.upstream_keys()):
                doomed.add(spec.key)
                assert graph == [spec]


def test_numbers_grow_in_all_threads_and_with_the_time() -> None:
    before = time.time_ns()
    numbers: list[list[int]] = []

    def take() -> None:
        numbers.append([task_spec.next_number() for _ in range(1000)])

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(one == sorted(one) for one in numbers)
    assert len({number for one in numbers for number in one}) == 4000
    assert before <= min(map(min, numbers)) and max(map(max, numbers)) < 2**63
