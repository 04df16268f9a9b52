"""What the scheduler's plugin answers, and how it retires workers: on a real scheduler with workers in this process."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import msgpack
import pytest
from distributed import secede
from distributed.comm.core import CommClosedError
from distributed.core import Status

from prefect_htcdask.scaling import kinds
from prefect_htcdask.scaling.counting import BUCKET
from prefect_htcdask.scaling.demand import DRAIN, PLUGIN_NAME, DemandPlugin
from tests.dask_cluster import counted, dask_cluster, gate, recount

OFFERS = {
    "cpu": {"htcdask-group-cpu": 2},
    "gpu": {"htcdask-group-gpu": 4, "GPU": 1},
}


def wait(number: int, *inputs: Any) -> int:
    """Waits for its gate."""
    assert gate(number).wait(30)
    return number


def leave_thread(number: int) -> int:
    """Leaves its thread to others, and waits."""
    secede()
    return wait(number)


def last(seconds: float, *inputs: Any) -> None:
    """Takes its time."""
    time.sleep(seconds)


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


async def test_retirement_moves_results_and_leaves_a_busy_worker_alone() -> None:
    async with dask_cluster() as cluster:
        holder, busy, empty = [await cluster.add_worker(1) for _ in range(3)]
        client = cluster.client
        gate(1).set()
        kept = client.submit(wait, 1, workers=[holder.address])
        await kept
        running = client.submit(wait, 2, workers=[busy.address], allow_other_workers=True)
        await cluster.until(lambda: cluster.scheduler.workers[busy.address].processing, "in hand")
        names = [holder.name, busy.name, empty.name, "htcdask-99.0"]
        assert sorted(await cluster.plugin.retire(names, idle_only=True)) == [holder.name, empty.name]
        assert [ws.name for ws in cluster.scheduler.workers.values()] == [busy.name]
        assert cluster.scheduler.workers[busy.address].status is Status.running
        assert await client.gather(kept) == 1
        assert [ts.state for ts in cluster.scheduler.tasks.values()].count("memory") == 1
        # Told to go all the same, it ends its task first, and gets no other.
        told: list[Any] = []
        busy.stream_handlers[DRAIN] = lambda **message: told.append(message)
        await cluster.add_worker(1)
        assert await cluster.plugin.retire([busy.name]) == [busy.name]
        later = client.map(wait, [1] * 3, pure=False)
        await client.gather(later)
        assert told and busy.name in (await cluster.demand())["closing"]
        assert await cluster.plugin.retire([busy.name]) == [], "it is leaving already"
        del later
        gate(2).set()
        assert await client.gather([kept, running]) == [1, 2]
        assert cluster.scheduler.tasks[running.key].who_has == {cluster.scheduler.workers[busy.address]}


async def test_a_worker_whose_results_find_no_place_stays_and_works_on() -> None:
    async with dask_cluster() as cluster:
        workers = [await cluster.add_worker(1) for _ in range(2)]
        client = cluster.client
        gate(1).set()
        kept = [client.submit(wait, 1, workers=[worker.address], pure=False) for worker in workers]
        await client.gather(kept)
        runs = cluster.scheduler.transition_counter
        assert await cluster.plugin.retire([worker.name for worker in workers], idle_only=True) == []
        await cluster.until(lambda: len(cluster.scheduler.running) == 2, "both take tasks again")
        assert len(cluster.scheduler.workers) == 2 and cluster.scheduler.transition_counter == runs
        assert sorted((await cluster.demand())["holding"]) == [worker.name for worker in workers]
        assert await client.submit(wait, 1, pure=False) == 1


async def test_a_worker_that_leaves_by_itself_is_left_to_do_so() -> None:
    async with dask_cluster() as cluster:
        leaving, _ = await cluster.add_worker(1), await cluster.add_worker(1)
        running = cluster.client.submit(wait, 1, workers=[leaving.address])
        # One that it has been sent, but has not begun, it would not begin any more.
        await cluster.until(lambda: leaving.state.executing, "at work")
        leaving.status = Status.closing_gracefully
        await cluster.until(lambda: len(cluster.scheduler.running) == 1, "word that it is leaving")
        assert await cluster.plugin.retire([leaving.name]) == []
        gate(1).set()
        assert await running == 1


async def test_a_worker_that_gets_a_task_while_others_are_retired_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Scheduler.retire_workers` waits for a lock before it stops workers from taking tasks."""
    async with dask_cluster() as cluster:
        worker = await cluster.add_worker(1)
        scheduler = cluster.scheduler
        async with scheduler._replica_lock("something else"):
            retiring = asyncio.ensure_future(cluster.plugin.retire([worker.name], idle_only=True))
            await asyncio.sleep(0)
            running = cluster.client.submit(wait, 1)
            await cluster.until(lambda: scheduler.workers[worker.address].processing, "in hand")
        assert await retiring == []
        await cluster.until(lambda: scheduler.running, "it takes tasks again")
        gate(1).set()
        assert await running == 1
        assert scheduler.tasks[running.key].suspicious == 0
        assert [entry[1:3] for entry in scheduler.transition_log if entry[0] == running.key][-2:] == [
            ("waiting", "processing"),
            ("processing", "memory"),
        ]


async def test_a_worker_that_is_lost_while_others_are_retired_takes_none_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with dask_cluster() as cluster:
        lost, *others = [await cluster.add_worker(1) for _ in range(4)]
        scheduler = cluster.scheduler

        def send(*messages: Any) -> None:
            raise CommClosedError("its connection has just broken")

        monkeypatch.setattr(scheduler.stream_comms[lost.address], "send", send)
        assert await cluster.plugin.retire([worker.name for worker in (lost, *others)], idle_only=True) == []
        await cluster.until(lambda: len(scheduler.running) == 3, "the others take tasks again")
        await cluster.until(lambda: lost.address not in scheduler.workers, "the lost one is removed")
        names = [worker.name for worker in others]
        assert sorted(await cluster.plugin.retire(names, idle_only=True)) == names


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
    monkeypatch.setattr(kinds, "MOST_NAMES", 5)
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


async def test_one_supervisor_owns_the_cluster() -> None:
    async with dask_cluster() as cluster:
        plugin = cluster.plugin
        plugin.lease, plugin.expires = 60.0, time.monotonic() + 60
        assert await plugin.claim("other") == {"granted": False, "owner": "test", "epoch": 1}
        plugin.expires = time.monotonic() - 1
        assert await plugin.claim("other") == {"granted": True, "owner": "other", "epoch": 2}
        assert await plugin.demand("test", 1) == {"status": "superseded", "owner": "other", "epoch": 2}
        plugin.expires = time.monotonic() - 1
        assert (await plugin.claim("test"))["epoch"] == 3
        tasks = cluster.client.map(wait, range(3), resources={"GPU": 1})
        await cluster.until(lambda: len(cluster.scheduler.unrunnable) == 3, "three tasks")
        assert set((await cluster.demand())["groups"]) == {"default"}
        # A new owner may have other groups; tasks are counted by those at once.
        assert (await plugin.claim("test", offers=OFFERS))["granted"]
        counter = plugin.counter
        assert (await cluster.demand())["groups"]["gpu"]["queued"] == 3
        assert (await plugin.claim("test", offers=OFFERS))["granted"] and plugin.counter is counter
        assert (await plugin.claim("test"))["granted"] and plugin.counter is counter
        del tasks


async def test_a_cluster_outlives_the_lease_of_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner's host may be asleep; only a cluster that nobody comes back to ends."""
    async with dask_cluster() as cluster:
        plugin = DemandPlugin(0.2, scheduler_lease=1.2)
        ended: list[float] = []

        async def end(why: str) -> None:
            ended.append(time.monotonic())

        monkeypatch.setattr(plugin, "end", end)
        with pytest.warns(UserWarning, match="overwriting"):
            await cluster.scheduler.register_scheduler_plugin(plugin, name=PLUGIN_NAME, idempotent=False)
        assert (await plugin.claim("test"))["granted"]
        await asyncio.sleep(0.5)  # the owner is asleep
        assert plugin.expires < time.monotonic() and not ended
        assert await cluster.demand(), "it is its owner's still"
        renewed = time.monotonic()
        assert not (await plugin.claim("other"))["granted"]
        await cluster.until(lambda: ended, "the cluster's end")
        assert ended[0] - renewed > 1.2


async def test_wishes_stand_beside_each_other_by_group() -> None:
    async with dask_cluster(OFFERS) as cluster:
        plugin = cluster.plugin
        assert (await cluster.demand())["requests"] == []
        await plugin.scale({"op": "scale", "n": 3, "group": "cpu"})
        await plugin.scale({"op": "adapt", "minimum": 0, "maximum": 9})
        await plugin.scale({"op": "scale", "n": 1, "group": "gpu"})
        assert (await plugin.scale({"op": "scale", "n": 4, "group": "cpu"}))["number"] == 4
        answer = await cluster.demand()
        assert answer["requests"] == [
            {"op": "adapt", "minimum": 0, "maximum": 9, "number": 2},
            {"op": "scale", "n": 1, "group": "gpu", "number": 3},
            {"op": "scale", "n": 4, "group": "cpu", "number": 4},
        ]


async def test_a_new_plugin_takes_over_from_the_one_before() -> None:
    async with dask_cluster() as cluster:
        before = cluster.plugin
        await before.scale({"op": "scale", "n": 3})
        await cluster.add_worker(1)
        tasks = cluster.client.map(wait, range(6))
        await cluster.until(lambda: len(cluster.scheduler.queued) == 4, "queued tasks")
        with pytest.warns(UserWarning, match="overwriting"):
            await cluster.scheduler.register_scheduler_plugin(
                DemandPlugin(0, OFFERS), name=PLUGIN_NAME, idempotent=False
            )
        await asyncio.sleep(0)
        assert before.task.cancelled()
        answer = await cluster.demand()
        assert (cluster.plugin.owner, cluster.plugin.epoch) == ("test", 1)
        assert answer["requests"][0]["n"] == 3
        assert answer["groups"]["cpu"]["queued"] == 4 and answer["in_hand"] == {"htcdask-1.0": 2}
        assert counted(cluster.plugin.counter) == recount(cluster.scheduler, OFFERS)
        # Installed once more as a client connects, the one that is there stays.
        await cluster.scheduler.register_scheduler_plugin(DemandPlugin(0), idempotent=True)
        assert set((await cluster.demand())["groups"]) == set(OFFERS)
        del tasks
