"""How workers leave, on a real scheduler and workers in this process."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, Scheduler, Status
from hypothesis import given
from hypothesis import strategies as st

from prefect_htcdask.worker.graceful_shutdown import (
    DRAIN,
    RESCHEDULED,
    HTCondorWorker,
    drain,
    drains_after,
    finished,
    in_hand,
    leave,
    warning,
)


@asynccontextmanager
async def cluster(workers: int, **options: Any) -> AsyncIterator[tuple[Scheduler, list[HTCondorWorker], Client]]:
    async with AsyncExitStack() as stack:
        scheduler = await stack.enter_async_context(
            Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0", dashboard=False)
        )
        started = [
            await stack.enter_async_context(HTCondorWorker(scheduler.address, nthreads=1, name=f"w{n}", **options))
            for n in range(workers)
        ]
        client = await stack.enter_async_context(Client(scheduler.address, asynchronous=True))
        yield scheduler, started, client


def counted(directory: str, name: str, seconds: float) -> str:
    """Leave a mark for this execution, then take a while; ends at once where a file `go` is."""
    with open(f"{directory}/{name}", "a") as stream:
        stream.write("x")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not Path(f"{directory}/go").exists():
        time.sleep(0.02)
    return name


def runs(directory: Path) -> dict[str, int]:
    return {path.name: len(path.read_text()) for path in directory.iterdir() if path.name != "go"}


async def until(condition: Any, timeout: float = 10) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        await asyncio.sleep(0.02)


def suspicions(scheduler: Scheduler) -> set[int]:
    return {task.suspicious for task in scheduler.tasks.values()}


async def test_draining_finishes_what_is_in_hand_and_keeps_all_results(tmp_path: Path) -> None:
    said: list[str] = []
    async with cluster(2) as (scheduler, (first, second), client):
        before = client.map(counted, [str(tmp_path)] * 6, [f"before-{n}" for n in range(6)], [0] * 6, workers=["w0"])
        await asyncio.gather(*before)
        futures = client.map(counted, [str(tmp_path)] * 8, [f"during-{n}" for n in range(8)], [0.5] * 8)
        await until(lambda: in_hand(first))
        await asyncio.wait_for(drain(first, said.append, time.monotonic() + 10), 10)
        assert first.status is Status.closed
        assert first.address not in scheduler.workers and second.address in scheduler.workers
        assert await client.gather(futures + before)
        assert suspicions(scheduler) == {0}
    assert set(runs(tmp_path).values()) == {1}, runs(tmp_path)
    assert said == []


async def test_what_a_worker_has_not_begun_goes_back_at_once(tmp_path: Path) -> None:
    async with cluster(2, resources={"GPU": 1}) as (scheduler, (first, second), client):
        # Tasks that ask for a resource are never queued: all of them are assigned.
        futures = client.map(
            counted, [str(tmp_path)] * 10, [str(n) for n in range(10)], [0.3] * 10, resources={"GPU": 1}
        )
        await until(lambda: in_hand(first) and in_hand(second))
        assert len(scheduler.workers[first.address].processing) > 1
        task = asyncio.ensure_future(drain(first, print, None))
        await until(lambda: len(scheduler.workers[first.address].processing) <= 1, 1)
        await asyncio.wait_for(task, 5)
        assert first.address not in scheduler.workers
        assert await client.gather(futures) == [str(n) for n in range(10)]
        assert suspicions(scheduler) == {0}
    assert set(runs(tmp_path).values()) == {1}, runs(tmp_path)


async def test_waiting_for_data_is_not_in_hand(tmp_path: Path) -> None:
    """Tasks whose inputs are still on their way are given back too, and their inputs are not lost."""
    async with cluster(2) as (scheduler, (first, _), client):
        big = client.submit(bytes, 200_000_000, workers=["w1"], allow_other_workers=False)
        await big
        sums = [client.submit(lambda data, n: len(data) + n, big, n, workers=["w0", "w1"]) for n in range(5)]
        await asyncio.wait_for(drain(first, print, time.monotonic() + 20), 20)
        assert await client.gather(sums) == [200_000_000 + n for n in range(5)]
        assert first.status is Status.closed and suspicions(scheduler) == {0}


async def test_a_task_longer_than_the_lifetime_ends_where_it_is(tmp_path: Path) -> None:
    said: list[str] = []
    async with cluster(2) as (scheduler, (first, _), client):
        future = client.submit(counted, str(tmp_path), "long", 2.0, workers=["w0"], allow_other_workers=True)
        await until(lambda: in_hand(first))
        await asyncio.wait_for(drain(first, said.append, time.monotonic() + 0.3), 10)
        assert await future == "long"
        assert suspicions(scheduler) == {0}
    assert runs(tmp_path) == {"long": 1}
    (line,) = said
    assert "past worker.lifetime" in line and "counted-" in line


async def test_results_wait_for_a_worker_that_takes_them(tmp_path: Path) -> None:
    said: list[str] = []
    async with cluster(1) as (scheduler, (first,), client):
        future = client.submit(counted, str(tmp_path), "only", 0)
        await future
        task = asyncio.ensure_future(drain(first, said.append, time.monotonic() + 60))
        await until(lambda: said)
        assert "waiting for one" in said[0]
        assert first.address in scheduler.workers and not scheduler.running
        # It takes no task meanwhile.
        other = client.submit(counted, str(tmp_path), "other", 0)
        async with HTCondorWorker(scheduler.address, nthreads=1):
            await asyncio.wait_for(task, 10)
            assert await other == "other"
            assert await future == "only"
    assert runs(tmp_path) == {"only": 1, "other": 1}
    assert len(said) == 1


async def test_results_that_nobody_takes_in_time_are_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefect_htcdask.worker.graceful_shutdown._CLOSING_TIME", 2.0)
    said: list[str] = []
    async with cluster(1) as (scheduler, (first,), client):
        future = client.submit(counted, str(tmp_path), "only", 0)
        await future
        await asyncio.wait_for(drain(first, said.append, time.monotonic()), 10)
        assert first.status is Status.closed
        async with HTCondorWorker(scheduler.address, nthreads=1):
            assert await future == "only"
    assert runs(tmp_path) == {"only": 2}
    assert "run again" in said[-1]


async def test_all_may_drain_at_once(tmp_path: Path) -> None:
    """Results of workers that leave together end up with the one that comes after."""
    async with cluster(3) as (scheduler, workers, client):
        futures = client.map(counted, [str(tmp_path)] * 9, [str(n) for n in range(9)], [0.1] * 9)
        await client.gather(futures)
        drains = [asyncio.ensure_future(drain(worker, print, time.monotonic() + 60)) for worker in workers]
        await until(lambda: not scheduler.running)
        async with HTCondorWorker(scheduler.address, nthreads=1):
            await asyncio.wait_for(asyncio.gather(*drains), 20)
            assert len(await client.gather(futures)) == 9
    assert set(runs(tmp_path).values()) == {1}


async def test_told_to_leave_the_task_in_hand_runs_again_and_nothing_else(tmp_path: Path) -> None:
    said: list[str] = []
    async with cluster(2, resources={"GPU": 1}) as (scheduler, (first, second), client):
        done = [client.submit(counted, str(tmp_path), f"done-{n}", 0, workers=["w0"]) for n in range(4)]
        await client.gather(done)
        futures = [client.submit(counted, str(tmp_path), f"t{n}", 60, resources={"GPU": 1}) for n in range(6)]
        await until(lambda: in_hand(first) and in_hand(second))
        (key,) = in_hand(first)
        hand = next(n for n, future in enumerate(futures) if future.key == key)
        watch = time.monotonic()
        await asyncio.wait_for(leave(first, said.append, 20.0), 20)
        assert time.monotonic() - watch < 10
        assert first.status is Status.closed
        (tmp_path / "go").touch()
        assert await client.gather(futures) == [f"t{n}" for n in range(6)]
        assert await client.gather(done) == [f"done-{n}" for n in range(4)]
        assert suspicions(scheduler) == {0}
        ((_, event),) = scheduler.get_events(RESCHEDULED)
        assert event["key"] == key and event["times"] == 1 and 0 < event["seconds"] < 20
    assert {name for name, n in runs(tmp_path).items() if n > 1} == {f"t{hand}"}
    assert key in said[0]


async def test_told_to_leave_a_short_task_ends_first(tmp_path: Path) -> None:
    async with cluster(2) as (scheduler, (first, _), client):
        future = client.submit(counted, str(tmp_path), "short", 1.0, workers=["w0"], allow_other_workers=True)
        await until(lambda: in_hand(first))
        await asyncio.wait_for(leave(first, print, 20.0), 20)
        assert await future == "short"
        assert scheduler.get_events(RESCHEDULED) == ()
    assert runs(tmp_path) == {"short": 1}


async def test_a_scheduler_that_does_not_answer_holds_nobody_up(tmp_path: Path) -> None:
    said: list[str] = []
    async with cluster(1) as (scheduler, (first,), _):

        async def never(*_: Any, **__: Any) -> None:
            await asyncio.sleep(600)

        for name in ("retire_workers", "unregister", "processing", "events"):
            scheduler.handlers[name] = never
        watch = time.monotonic()
        await asyncio.wait_for(leave(first, said.append, 8.0), 10)
        assert time.monotonic() - watch < 8.0
        assert first.status is Status.closed


@pytest.mark.filterwarnings("ignore:task .* was taken from its worker")
async def test_a_task_handed_back_again_and_again_is_told_of(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    shown: list[str] = []
    async with cluster(4) as (scheduler, workers, client):
        client.subscribe_topic("warn", lambda event: shown.append(event[1]["message"]))
        future = client.submit(counted, str(tmp_path), "endless", 60)
        for _ in range(3):
            await until(lambda: [w for w in workers if w.status is Status.running and in_hand(w)])
            (holder,) = [w for w in workers if w.status is Status.running and in_hand(w)]
            assert len(shown) == 0, "not before the third time"
            await asyncio.wait_for(leave(holder, print, 2.0), 5)
        await until(lambda: shown)
        assert [event["times"] for _, event in scheduler.get_events(RESCHEDULED)] == [1, 2, 3]
        (tmp_path / "go").touch()
        assert await future == "endless"
        assert suspicions(scheduler) == {0}
    text = warning(future.key, 12.3, 3)
    assert "3 times" in text and "12 s" in text and "worker.lifetime" in text and future.key in text


async def test_the_scheduler_may_ask_for_it(tmp_path: Path) -> None:
    async with cluster(2) as (scheduler, (first, _), client):
        due = asyncio.Event()
        first.stream_handlers[DRAIN] = lambda **_: due.set()
        future = client.submit(counted, str(tmp_path), "task", 1, workers=["w0"], allow_other_workers=True)
        await until(lambda: in_hand(first))
        scheduler.stream_comms[first.address].send({"op": DRAIN})
        await asyncio.wait_for(due.wait(), 5)
        await asyncio.wait_for(drain(first, print, None), 5)
        assert await future == "task"
    assert runs(tmp_path) == {"task": 1}


async def test_a_worker_that_the_scheduler_closes_has_finished() -> None:
    async with cluster(2) as (scheduler, (first, _), _client):
        waiting = asyncio.ensure_future(finished(first))
        await scheduler.retire_workers(names=["w0"], close_workers=True)
        await asyncio.wait_for(waiting, 5)
        assert first.status is Status.closed


@given(
    lifetime=st.floats(1, 1e6),
    share=st.floats(0, 1),
    cluster_id=st.integers(0, 10**7),
    proc=st.integers(0, 10**5),
)
def test_draining_begins_within_the_stagger(lifetime: float, share: float, cluster_id: int, proc: int) -> None:
    stagger = share * lifetime
    moment = drains_after(lifetime, stagger, f"{cluster_id}.{proc}")
    assert lifetime - stagger - 1e-6 <= moment <= lifetime - stagger / 4 + 1e-6


@given(cluster_id=st.integers(1, 10**6), workers=st.integers(2, 50), one_by_one=st.booleans())
def test_workers_leave_one_after_the_other(cluster_id: int, workers: int, one_by_one: bool) -> None:
    """Jobs of one submission, or of as many submissions in a row, are spread over the stagger."""
    ids = [f"{cluster_id + n}.0" if one_by_one else f"{cluster_id}.{n}" for n in range(workers)]
    moments = sorted(drains_after(1000, 400, job_id) for job_id in ids)
    gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
    assert min(gaps) > 300 / workers / 4
