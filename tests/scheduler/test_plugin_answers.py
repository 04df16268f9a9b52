"""What the scheduler's plugin answers: on a real scheduler with workers in this process."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import msgpack
import pytest
from distributed import secede
from distributed.core import Status

from prefect_htcdask.scheduler import task_kinds
from prefect_htcdask.scheduler.demand import BUCKET
from tests.support.dask_cluster import OFFERS, counted, dask_cluster, gate, recount, wait


def leave_thread(number: int) -> int:
    """Leaves its thread to others, and waits."""
    secede()
    return wait(number)


def last(seconds: float, *inputs: Any) -> None:
    """Takes its time."""
    time.sleep(seconds)


def fail(seconds: float) -> None:
    """Takes its time, and fails."""
    time.sleep(seconds)
    raise ZeroDivisionError


async def test_tasks_without_a_worker_by_group() -> None:
    async with dask_cluster(OFFERS) as cluster:
        client = cluster.client
        futures = [
            *client.map(wait, range(5)),
            *client.map(wait, range(5, 8), resources={"htcdask-group-gpu": 1}),
            client.submit(wait, 8, resources={"GPU": 1}),
            client.submit(wait, 9, resources={"GPU": 2}),
            client.submit(wait, 10, resources={"GPU": 1, "TPU": 0.5}),
            client.submit(wait, 11, workers=["tcp://127.0.0.1:9"]),
            client.submit(wait, 12, workers=["tcp://127.0.0.1:9"], allow_other_workers=True),
            client.submit(wait, 13, resources={"TPU": 1}, workers=["tcp://127.0.0.1:9"], allow_other_workers=True),
        ]
        await cluster.until(lambda: len(cluster.scheduler.unrunnable) + len(cluster.scheduler.queued) == 14, "tasks")
        answer = await cluster.demand()
        assert {name: group["queued"] for name, group in answer["groups"].items()} == {"cpu": 7, "gpu": 4}
        assert answer["unmatched"] == {"GPU=2": 1, "GPU=1, TPU=0.5": 1, "worker=tcp://127.0.0.1:9": 1}
        assert answer["in_hand"] == answer["idle"] == {} and answer["joined"] == []
        await client.cancel(futures)
        await cluster.until(lambda: not cluster.scheduler.tasks, "no task")
        answer = await cluster.demand()
        assert [group["queued"] for group in answer["groups"].values()] == [0, 0]
        assert answer["unmatched"] == {}


async def test_work_is_told_by_the_mean_of_each_name() -> None:
    async with dask_cluster() as cluster:
        await cluster.add_worker(1)
        await cluster.client.gather(cluster.client.map(last, [0.1, 0.3], pure=False))
        default = (await cluster.demand())["groups"]["default"]
        assert 0.19 < default["task_seconds"] < 1
        assert default["work"] == 0
        known = cluster.client.map(last, [0.0] * 6, [cluster.client.submit(wait, 1)] * 6, pure=False)
        await cluster.until(
            lambda: sum(ts.state == "waiting" for ts in cluster.scheduler.tasks.values()) == 6, "waiting"
        )
        # The gated task's name is unknown: the mean of all. Those that wait for it are not work yet.
        default = (await cluster.demand())["groups"]["default"]
        assert default["work"] == pytest.approx(default["task_seconds"]) and default["unknown"] == 1
        assert sum(default["coming"].values()) == 6
        gate(1).set()
        await cluster.client.gather(known)
        answer = await cluster.demand()
        assert answer["groups"]["default"]["work"] == 0
        assert set(answer["durations"]) == {"last", "wait"}


async def test_the_time_that_ended_tasks_took_is_told() -> None:
    async with dask_cluster(OFFERS) as cluster:
        await cluster.add_worker(1, OFFERS["cpu"])
        await cluster.add_worker(1, OFFERS["gpu"])
        client = cluster.client
        good = client.map(last, [0.2, 0.1], pure=False)
        bad = client.submit(fail, 0.3, pure=False, resources={"GPU": 1})
        late = client.submit(last, 0.0, client.submit(wait, 1))
        await client.gather(good)
        with pytest.raises(ZeroDivisionError):
            await bad
        await cluster.until(lambda: len(cluster.plugin.counter._in_hand) == 1, "the gated task alone in hand")
        answer = await cluster.demand()
        cpu, gpu = answer["groups"]["cpu"], answer["groups"]["gpu"]
        assert (cpu["done"], gpu["done"], answer["unfinished"]) == (2, 1, 2)
        assert 0.3 <= cpu["spent"] < 1.3 and 0.3 <= gpu["spent"] < 1.3
        assert gpu["task_seconds"] == 0, "what failed teaches nothing of how long its like takes"
        gate(1).set()
        await late
        answer = await cluster.demand()
        assert (answer["groups"]["cpu"]["done"], answer["unfinished"]) == (4, 0)
        # Results that are let go of, and counting anew, take nothing of it back.
        del good, late
        cluster.plugin.counter.count()
        assert (await cluster.demand())["groups"]["cpu"]["done"] == 4


async def test_waiting_tasks_are_forecast_when_all_that_they_need_is_in_hand() -> None:
    config = {"distributed.scheduler.default-task-durations": {"wait": "95s", "leave_thread": "15s"}}
    async with dask_cluster(config=config) as cluster:
        await cluster.add_worker(2)
        client = cluster.client
        long, short = client.submit(wait, 1), client.submit(leave_thread, 2)
        await cluster.until(lambda: len(cluster.plugin.counter._in_hand) == 2, "two in hand")
        both = client.map(last, [0.0] * 3, [long] * 3, [short] * 3, pure=False)
        one = client.submit(last, 0.0, short, pure=False)
        unready = client.submit(last, 0.0, one, long, pure=False)
        await cluster.until(lambda: len(cluster.scheduler.tasks) == 7, "seven tasks")
        coming = (await cluster.demand())["groups"]["default"]["coming"]
        assert sum(coming.values()) == 4
        assert sum(count for seconds, count in coming.items() if 90 - BUCKET <= seconds <= 100) == 3
        assert sum(count for seconds, count in coming.items() if 10 - BUCKET <= seconds <= 20) == 1
        # What is late is told with how late it is; what is far as for the farthest time.
        counter = cluster.plugin.counter
        later = counter.told({}, time.monotonic() + 1000)["default"]["coming"]
        assert sorted(later.values()) == [1, 3]
        assert all(-1000 <= seconds <= -890 for seconds in later)
        assert counter.told({}, time.monotonic() + 1e5)["default"]["coming"] == {-3600: 4}
        earlier = counter.told({}, time.monotonic() - 1e5)["default"]["coming"]
        assert earlier == {3600: 4}
        gate(2).set()
        await one
        # Its input is done, and the other in hand.
        assert sum((await cluster.demand())["groups"]["default"]["coming"].values()) == 4
        gate(1).set()
        await client.gather([*both, unready])
        assert (await cluster.demand())["groups"]["default"]["coming"] == {}


async def test_tasks_pile_up_on_workers_beyond_threads_and_resources() -> None:
    async with dask_cluster(OFFERS) as cluster:
        await cluster.add_worker(2, {"htcdask-group-cpu": 2})
        await cluster.add_worker(4, {"htcdask-group-gpu": 4, "GPU": 1})
        client = cluster.client
        on_cpu = client.map(wait, range(10), resources={"htcdask-group-cpu": 1})
        on_gpu = client.map(wait, range(10, 13), resources={"GPU": 1})
        await cluster.until(lambda: len(cluster.plugin.counter._in_hand) == 13, "all assigned")
        answer = await cluster.demand()
        assert {name: group["stacked"] for name, group in answer["groups"].items()} == {"cpu": 8, "gpu": 2}
        assert answer["in_hand"] == {"htcdask-1.0": 10, "htcdask-2.0": 3}
        assert [group["queued"] for group in answer["groups"].values()] == [0, 0]
        # A pile longer than the part of it that is looked at.
        more = client.map(wait, range(20, 120), resources={"htcdask-group-cpu": 1})
        await cluster.until(lambda: len(cluster.plugin.counter._in_hand) == 113, "all assigned")
        assert (await cluster.demand())["groups"]["cpu"]["stacked"] == 108
        # Tasks of both groups on one worker, which offers the resources of both.
        await client.cancel([*on_cpu, *on_gpu, *more])
    async with dask_cluster(OFFERS) as cluster:
        await cluster.add_worker(4, {"htcdask-group-cpu": 4, "GPU": 1})
        one = cluster.client.map(wait, range(6), resources={"htcdask-group-cpu": 1})
        other = cluster.client.map(wait, range(10, 13), resources={"GPU": 1})
        await cluster.until(lambda: len(cluster.plugin.counter._in_hand) == 9, "all assigned")
        stacked = {name: group["stacked"] for name, group in (await cluster.demand())["groups"].items()}
        assert stacked["gpu"] >= 2 and stacked["cpu"] >= 2 and sum(stacked.values()) == 5
        del one, other


async def test_a_task_that_left_its_thread_keeps_its_worker_but_wants_no_thread() -> None:
    async with dask_cluster() as cluster:
        worker = await cluster.add_worker(1)
        left = cluster.client.map(leave_thread, range(3))
        await cluster.until(
            lambda: len(cluster.scheduler.workers[worker.address].long_running) == 3, "three left their thread"
        )
        answer = await cluster.demand()
        assert answer["in_hand"] == {"htcdask-1.0": 1} and answer["idle"] == {}
        assert answer["groups"]["default"]["stacked"] == 0
        assert await cluster.plugin.retire(["htcdask-1.0"], idle_only=True) == []
        del left


async def test_idle_holding_and_closing_workers() -> None:
    async with dask_cluster() as cluster:
        first, second = await cluster.add_worker(1), await cluster.add_worker(1)
        await cluster.add_worker(1, name="foreign")
        client = cluster.client
        gate(1).set()
        await asyncio.sleep(0.2)
        begun = time.monotonic()
        kept = client.submit(wait, 1, workers=[first.address])
        await kept
        ended = time.monotonic()
        running = client.submit(wait, 2, workers=[second.address])
        await cluster.until(lambda: cluster.scheduler.workers[second.address].processing, "in hand")
        await asyncio.sleep(0.2)
        asked = time.monotonic()
        answer = await cluster.demand()
        answered = time.monotonic()
        assert sorted(answer["joined"]) == ["htcdask-1.0", "htcdask-2.0"]
        assert answer["in_hand"] == {"htcdask-2.0": 1}
        assert set(answer["idle"]) == {"htcdask-1.0"}
        # Idle since its last task ended, not since it was asked for, nor since it joined.
        assert asked - ended <= answer["idle"]["htcdask-1.0"] <= answered - begun
        assert answer["holding"] == ["htcdask-1.0"] and answer["closing"] == []
        second.status = Status.closing_gracefully
        await cluster.until(lambda: len(cluster.scheduler.running) == 2, "word that it is leaving")
        answer = await cluster.demand()
        assert answer["closing"] == ["htcdask-2.0"] and answer["in_hand"] == {"htcdask-2.0": 1}
        first.status = Status.paused
        await cluster.until(lambda: len(cluster.scheduler.running) == 1, "word that it is paused")
        # It may go on at any time.
        assert (await cluster.demand())["closing"] == ["htcdask-2.0"]
        gate(2).set()
        await running
        await second.close(nanny=False)
        await cluster.until(lambda: len(cluster.scheduler.workers) == 2, "gone")
        assert (await cluster.demand())["joined"] == ["htcdask-1.0"]
        assert set(cluster.plugin.counter.last_busy) == set(cluster.scheduler.workers)


async def test_an_input_too_large_for_any_worker_is_counted_out() -> None:
    """The scheduler then reports a task as leaving a worker that it never reported as going there."""
    async with dask_cluster(config={"distributed.scheduler.worker-saturation": math.inf}) as cluster:
        await cluster.add_worker(1, memory_limit="1 MB")
        client = cluster.client
        large = client.submit(bytes, 2_000_000)
        await large
        waited = client.submit(wait, 1, large)
        alone = client.submit(len, large)
        with pytest.raises(MemoryError):
            await alone
        with pytest.raises(MemoryError):
            await waited
        assert counted(cluster.plugin.counter) == recount(cluster.scheduler, None)
        assert (await cluster.demand())["groups"]["default"]["work"] == 0
        assert cluster.plugin.counter.recounts == 0


async def test_the_answer_does_not_grow_with_the_tasks() -> None:
    async def size(tasks: int) -> int:
        async with dask_cluster(OFFERS) as cluster:
            await cluster.add_worker(1, {"htcdask-group-cpu": 1})
            client = cluster.client
            futures = client.map(wait, range(tasks), key=[f"task-{n:08x}" for n in range(tasks)])
            await cluster.until(lambda: cluster.plugin.counter._in_hand, "one in hand")
            total = client.submit(sum, futures)
            await cluster.until(lambda: total.key in cluster.scheduler.tasks, "all there")
            answer = await cluster.demand()
            assert sum(answer["in_hand"].values()) + answer["groups"]["cpu"]["queued"] == tasks
            await client.cancel(futures, force=True)
            return len(msgpack.packb(answer))

    few, many = await size(4), await size(2000)
    assert abs(many - few) < 40


async def test_names_are_told_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_kinds, "MOST_NAMES", 5)
    async with dask_cluster(OFFERS) as cluster:
        await cluster.add_worker(1)
        client = cluster.client
        letters = "abcdefgh"
        await client.gather([client.submit(abs, 1, key=f"name{letter}-{1:08x}") for letter in letters])
        wants = [client.submit(abs, 1, resources={f"R{number}": 1}, pure=False) for number in range(8)]
        await cluster.until(lambda: len(cluster.scheduler.unrunnable) == 8, "tasks that nobody can run")
        answer = await cluster.demand()
        assert len(answer["durations"]) == 5 and set(answer["durations"]) <= {f"name{letter}" for letter in letters}
        assert len(answer["unmatched"]) == 5
        del wants
