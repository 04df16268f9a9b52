"""How final states come home: many in one round trip, and none held back that somebody waits for."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import dask
import distributed
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect import flow, get_client, task
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.runtime import flow_run as flow_run_runtime
from prefect.states import Completed

from prefect_htcdask import HTCDaskTaskRunner
from prefect_htcdask.errors import TaskRunLost
from prefect_htcdask.runner.futures import batching, gatherer
from prefect_htcdask.runner.futures.batching import (
    FEW,
    GATHER_BYTES,
    INTERVAL,
    LONGEST_INTERVAL,
    MAX_BATCH,
    batch_delay,
    batch_size,
    interval,
)
from prefect_htcdask.runner.futures.futures import HTCDaskFuture, _rebuild
from prefect_htcdask.runner.futures.pending_result import CollectedFuture
from prefect_htcdask.runner.futures.prefetch import SMALL
from prefect_htcdask.runner.submit.upstream_futures import UpstreamFutures
from prefect_htcdask.worker.call import Upstream
from tests.support.this_flow import run_of_this_flow
from tests.support.waiting import wait_until

counts = st.integers(0, 10 * MAX_BATCH)
seconds = st.floats(0, 10)


@given(full=st.booleans(), asked=counts, since=seconds)
def test_nothing_waits_that_somebody_blocks_on(full: bool, asked: int, since: float) -> None:
    assert batch_delay(full, asked, True, since) == 0


@given(full=st.booleans(), asked=st.integers(0, FEW), awaited=st.booleans(), since=seconds)
def test_few_never_wait(full: bool, asked: int, awaited: bool, since: float) -> None:
    assert batch_delay(full, asked, awaited, since) == 0


@given(full=st.booleans(), asked=st.integers(FEW + 1), since=seconds)
def test_of_many_each_waits_until_the_interval_is_over_or_a_batch_is_full(full: bool, asked: int, since: float) -> None:
    pause = batch_delay(full, asked, False, since)
    assert 0 <= pause <= interval(asked)
    assert (pause == 0) == (full or since >= interval(asked))
    assert since + pause >= interval(asked) - 1e-9 or full  # sums of floats are rounded


@given(st.integers(0), st.integers(0))
def test_the_more_are_asked_for_the_less_often_they_are_gathered_within_bounds(one: int, other: int) -> None:
    assert interval(0) == INTERVAL and interval(10**9) == LONGEST_INTERVAL
    assert interval(min(one, other)) <= interval(max(one, other))


@given(st.lists(st.floats(0, 1e12)))
def test_a_gather_brings_few_large_results_or_many_small_ones(sizes: list[float]) -> None:
    size = batch_size(sizes)
    assert min(1, len(sizes)) <= size <= min(MAX_BATCH, len(sizes))
    assert size <= 1 or sum(sizes[:size]) <= GATHER_BYTES
    assert size in (MAX_BATCH, len(sizes)) or sum(sizes[: size + 1]) > GATHER_BYTES


@task
def nothing(x: int) -> int:
    return x


@task
def of_size(size: int) -> bytes:
    return bytes(size)


def gatherer_of_this_flow() -> gatherer.Gatherer:
    return run_of_this_flow().gatherer


@contextmanager
def gathers() -> Iterator[list[int]]:
    """The sizes of the batches that this flow run gathers meanwhile."""
    its, sizes = gatherer_of_this_flow(), []
    gather = its._gather

    async def noted(batch: Any) -> None:
        sizes.append(len(batch))
        await gather(batch)

    its._gather = noted  # type: ignore[method-assign]
    try:
        yield sizes
    finally:
        its._gather = gather  # type: ignore[method-assign]


def all_finished(futures: Any) -> bool:
    return all(future.wrapped_future.status == "finished" for future in futures)


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize("how", ["result", "wait"])
def test_the_states_of_a_list_come_in_few_round_trips(runner: HTCDaskTaskRunner, how: str) -> None:
    count = 80

    @flow(task_runner=runner)
    def computing() -> tuple[list[int], list[int]]:
        futures = nothing.map(range(count))
        wait_until(lambda: all_finished(futures), 120, "all have ended", pause=0.5)
        with gathers() as sizes:
            getattr(futures, how)()
        return sizes, futures.result()

    sizes, found = computing()
    print(f"gathered {sizes}")
    assert found == list(range(count)) and sum(sizes) == count
    assert len(sizes) <= 20 and max(sizes) <= MAX_BATCH


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize("size", [10, 200_000])
def test_small_results_taken_in_turn_come_in_few_round_trips(runner: HTCDaskTaskRunner, size: int) -> None:
    count = 80

    @flow(task_runner=runner)
    def computing() -> list[int]:
        futures = [of_size.submit(size) for _ in range(count)]
        wait_until(lambda: all_finished(futures), 120, "all have ended", pause=0.5)
        with gathers() as sizes:
            for future in futures[:20]:
                assert len(future.result()) == size
            wait_until(lambda: not gatherer_of_this_flow()._asked, 20, "all that was asked for has come")
            in_hand = sum(future.packed is not None for future in futures)
            # Large ones stay on their workers until they are asked for.
            assert in_hand == 20 if size > SMALL else 20 < in_hand <= 40, "as many as were taken"
            for future in futures[20:]:
                assert len(future.result()) == size
        return sizes

    sizes = computing()
    print(f"gathered {sizes}")
    assert sum(sizes) == count
    assert len(sizes) == count if size > SMALL else len(sizes) <= 20


class OnlyThere:
    """Cannot be unpickled but in the process that made it, as what needs a library that only workers have."""

    def __init__(self) -> None:
        self.process = os.getpid()

    def __reduce__(self) -> Any:
        return _only_in, (self.process,)


def _only_in(process: int) -> OnlyThere:
    if os.getpid() != process:
        raise ImportError("this process does not have it")
    return OnlyThere()


@task
def only_there(number: int) -> Any:
    return number if number < 12 else OnlyThere()


@task
def knows(one: Any) -> bool:
    return isinstance(one, OnlyThere)


@pytest.mark.usefixtures("prefect_api")
def test_what_was_only_asked_for_ahead_does_not_fail(local_pool: distributed.LocalCluster) -> None:
    """The results that cannot be brought here have never been asked for; other tasks use them where they are."""

    @flow(task_runner=HTCDaskTaskRunner(cluster=local_pool))
    def computing() -> list[bool]:
        futures = [only_there.submit(number) for number in range(24)]
        wait_until(lambda: all_finished(futures), 60, "all have ended")
        for future in futures[:12]:
            future.result()
        its = gatherer_of_this_flow()
        wait_until(lambda: not its._asked and not its._gathers, 20, "what was asked for ahead was gathered, or not")
        assert not any(future.packed for future in futures[12:])
        with dask.annotate(workers=[_worker_of(future) for future in futures[12:13]]):
            found = [knows.submit(future) for future in futures[12:] if _worker_of(future) == _worker_of(futures[12])]
        return [future.result() for future in found]

    found = computing()
    assert found and all(found)


def _worker_of(future: HTCDaskFuture[Any]) -> str:
    (address,) = future.wrapped_future.client.who_has([future.wrapped_future])[future.wrapped_future.key]
    return str(address)


@pytest.mark.usefixtures("prefect_api")
def test_who_blocks_on_one_of_many_does_not_wait_for_the_others(
    runner: HTCDaskTaskRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "INTERVAL", 3600.0)
    monkeypatch.setattr(batching, "LONGEST_INTERVAL", 3600.0)

    @flow(task_runner=runner)
    def computing() -> None:
        futures = nothing.map(range(3 * FEW))
        wait_until(lambda: all_finished(futures), 60, "all have ended")
        its = gatherer_of_this_flow()
        its._sizes.saw([("nothing", 1)] * 10)
        its._began = time.monotonic()
        heard: list[Any] = []
        for future in futures:
            future.add_done_callback(heard.append)
        wait_until(lambda: its._due < math.inf or its._looking, 20, "what is ready is looked at")
        # The first few came at once; the rest would for an hour not.
        held = [future for future in futures if future.packed is None]
        assert len(held) > 1
        assert held[-1].result(timeout=20) == 3 * FEW - 1
        # What was ready came with it.
        wait_until(lambda: len(heard) == len(futures), 20, "all have come")

    computing()


@pytest.mark.usefixtures("prefect_api")
def test_dask_lets_go_of_what_was_collected(runner: HTCDaskTaskRunner) -> None:
    @flow(task_runner=runner)
    def computing() -> None:
        client = gatherer_of_this_flow_of(first := nothing.submit(1)).client
        assert isinstance(first.wrapped_future, distributed.Future)
        whole = first.wrapped_future.result()
        assert whole.is_completed() and whole.data.result == 1
        del whole
        assert first.result() == 1
        kept: Any = first.wrapped_future
        assert isinstance(kept, CollectedFuture) and kept.client is client
        assert (kept.status, kept.done(), kept.cancelled()) == ("finished", True, False)
        state = first.state
        assert kept.result() is state and first._final_state is state
        wait_until(lambda: kept.key not in client.futures, 20, "the client has forgotten the Dask future")
        # Its state still serves what comes after it.
        assert nothing.submit(first).result() == 1

    computing()


def gatherer_of_this_flow_of(future: Any) -> gatherer.Gatherer:
    its = gatherer_of_this_flow()
    assert future.gatherer is its
    return its


def test_a_future_that_has_its_state_needs_no_collector() -> None:
    future = _rebuild(HTCDaskFuture, uuid4(), None, Completed(data=1), "one")
    heard: list[Any] = []
    future.add_done_callback(heard.append)
    assert heard == [future]


@pytest.mark.usefixtures("prefect_api")
def test_what_a_submit_needs_stays_on_the_cluster_until_it_is_sent(runner: HTCDaskTaskRunner) -> None:
    """Another thread may collect it meanwhile: here, between the two."""

    @flow(task_runner=runner)
    def computing() -> None:
        first = nothing.submit(1)
        its = gatherer_of_this_flow_of(first)
        key = first.wrapped_future.key
        needs = UpstreamFutures(its.client)
        assert isinstance(needs.replace(first), Upstream)
        assert first.result() == 1 and isinstance(first.wrapped_future, CollectedFuture)
        second = nothing.submit(2)
        assert second.result() == 2
        # Whatever was to be released before that has been.
        assert key in its.client.futures
        del needs
        wait_until(lambda: key not in its.client.futures, 20, "nobody needs it any more")

    computing()


@pytest.mark.usefixtures("prefect_api")
def test_what_was_lost_as_a_gather_began_and_is_back_as_it_ends_is_gathered_again(runner: HTCDaskTaskRunner) -> None:
    """The state's ways are set here by hand: no worker can be killed between two lines of ours."""

    @flow(task_runner=runner)
    def computing() -> int:
        future = nothing.submit(7)
        wait_until(lambda: all_finished([future]), 60, "it has ended")
        its = gatherer_of_this_flow()
        state: Any = future.wrapped_future._state

        async def gathered() -> None:
            state.lose()
            its.on_first = lambda: its.client.loop.add_callback(state.finish)
            await its._gather([future.pending_result])

        future.wrapped_future.client.sync(gathered)
        return future.result(timeout=20)

    assert computing() == 7


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize("times", [1, gatherer.MAX_BROKEN, gatherer.MAX_BROKEN + 1])
def test_what_was_not_there_is_gathered_again_but_not_for_ever(
    runner: HTCDaskTaskRunner, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a task that had failed as Dask looked for its result, and runs again."""
    monkeypatch.setattr(gatherer, "POLL", 0.02)

    @flow(task_runner=runner)
    def computing() -> int:
        future = nothing.submit(7)
        wait_until(lambda: all_finished([future]), 60, "it has ended")
        its = gatherer_of_this_flow()
        whole, left = its._connection.gather, [None] * times

        async def less(finished: Any) -> Any:
            return await whole(finished) if not left else left.pop() or dict.fromkeys(finished)

        its._connection.gather = less  # type: ignore[method-assign]
        return future.result(timeout=20)

    if times > gatherer.MAX_BROKEN:
        with pytest.raises(TaskRunLost, match="finished"):
            computing()
    else:
        assert computing() == 7


class Awkward(Exception):
    """Pickles, and does not unpickle, as many exceptions of users' own."""

    def __init__(self, what: str, number: int) -> None:
        super().__init__(f"{what} {number}")


@task
def one_is_awkward(x: int) -> int:
    if x == 7:
        raise Awkward("no", x)
    return x


@pytest.mark.usefixtures("prefect_api")
def test_a_state_that_cannot_be_brought_here_spares_the_others(runner: HTCDaskTaskRunner) -> None:
    ids: list[Any] = []

    @flow(task_runner=runner)
    def computing() -> list[Any]:
        ids.append(flow_run_runtime.id)
        futures = one_is_awkward.map(range(30))
        wait_until(lambda: all_finished(futures), 60, "all have ended")
        return [future.result(raise_on_failure=False) for future in futures]

    *before, awkward = computing()[:8]
    assert before == list(range(7))
    assert type(awkward).__name__ == "Awkward" and str(awkward) == "no 7"
    with get_client(sync_client=True) as client:

        def names() -> list[str]:
            found = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=ids)))
            return sorted(str(run.state_name) for run in found)

        # Its worker has told how it ended.
        wait_until(lambda: names() == ["Completed"] * 29 + ["Failed"], 20, "the API's states")


@task
def waits(gate: Path) -> None:
    wait_until(gate.exists, 60, "the gate")


@pytest.mark.usefixtures("prefect_api")
def test_lost_task_runs_that_wait_for_an_explanation_hold_up_nothing_else(
    runner: HTCDaskTaskRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That HTCondor is slow to tell of jobs is made here; Dask's part, and the task runs, are real."""
    monkeypatch.setattr(gatherer, "last_worker", lambda result: "htcdask-1.0-0")

    @flow(task_runner=runner)
    def computing() -> int:
        told, asking = asyncio.Event(), []

        async def wait_for(worker: str) -> None:
            asking.append(worker)
            await told.wait()

        lost = [waits.submit(tmp_path / "gate") for _ in range(2 * gatherer.MAX_GATHERS)]
        its = gatherer_of_this_flow_of(lost[0])
        monkeypatch.setattr(its.job_outcomes, "wait_for", wait_for)
        for future in lost:
            its.request(future.pending_result)
        its.client.cancel([future.wrapped_future for future in lost])
        wait_until(lambda: len(asking) == len(lost), 20, "all wait for what became of their workers")
        (tmp_path / "gate").touch()
        found = nothing.submit(1).result(timeout=20)
        assert not any(future.packed for future in lost)
        its.client.loop.add_callback(told.set)  # type: ignore[attr-defined]
        for future in lost:
            assert isinstance(future.result(timeout=20, raise_on_failure=False), TaskRunLost)
        return found

    assert computing(return_state=True).result(raise_on_failure=False) == 1
