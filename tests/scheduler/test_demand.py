"""The counts by transition against a count from scratch: real schedulers and workers, at every turn of the loop."""

from __future__ import annotations

import asyncio
import inspect
import random
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest
from distributed import Future, Worker, get_worker, secede
from distributed.core import Status
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefect_htcdask.scheduler.plugin import DemandPlugin
from tests.support.dask_cluster import GATES, Cluster, counted, dask_cluster, gate, recount

OFFERS = {"cpu": {"htcdask-group-cpu": 2}, "gpu": {"htcdask-group-gpu": 2, "GPU": 1}, "big": {"GPU": 4}}
ASKED: list[dict[str, float] | None] = [None, None, {"htcdask-group-cpu": 1}, {"GPU": 1}, {"GPU": 2}, {"TPU": 1}]
WORKERS = [{}, {"htcdask-group-cpu": 2}, {"htcdask-group-gpu": 2, "GPU": 1}, {"GPU": 4}]
ENDS = ["ends", "ends", "fails", "secedes", "reschedules", "kills"]
DEADLINE = 30.0
ENDING = threading.Event()
"""Set once a script lets everything end: no task takes its worker away then, for nobody would start another."""


def task(number: int, end: str, *inputs: Any) -> int:
    """Waits for its gate, and ends as told."""
    if end == "secedes":
        secede()
    assert gate(number).wait(DEADLINE)
    if end == "fails":
        raise ValueError(number)
    if end == "reschedules" and random.random() < 0.5:
        from distributed import Reschedule

        raise Reschedule
    if end == "kills" and not ENDING.is_set() and random.random() < 0.5:
        worker = get_worker()
        worker.loop.add_callback(worker.close, executor_wait=False, nanny=False)
    return number


def other(number: int, end: str, *inputs: Any) -> int:
    """Another name."""
    return task(number, end, *inputs)


class Holder:
    """An actor."""

    def get(self) -> int:
        """Something."""
        return 1


class Script:
    """Carries out steps on a cluster, and watches the counts meanwhile."""

    def __init__(self, cluster: Cluster, offers: dict[str, Any] | None, seed: int) -> None:
        self.cluster = cluster
        self.offers = offers
        self.futures: list[Future] = []
        self.random = random.Random(seed)
        self.number = 0
        self.checks = 0
        self.seen = {"queued": 0, "coming": 0, "unmatched": 0}
        self.background: list[asyncio.Task[Any]] = []

    def check(self) -> None:
        """The counts are right now."""
        have, want = counted(self.cluster.plugin.counter), recount(self.cluster.scheduler, self.offers)
        assert have == want
        self.checks += 1
        for what in self.seen:
            self.seen[what] += bool(want[what])

    async def watch(self) -> None:
        """Check at every turn of the loop."""
        while True:
            self.check()
            await asyncio.sleep(0)

    def some(self, number: int) -> list[Future]:
        """Some futures that are held."""
        return self.random.sample(self.futures, min(number, len(self.futures)))

    # The steps

    async def submit(self) -> None:
        """A task with up to three inputs."""
        self.number += 1
        asked = self.random.choice(ASKED)
        function = self.random.choice([task, other])
        inputs = [future for future in self.some(self.random.randrange(4)) if future.status != "cancelled"]
        self.futures.append(
            self.cluster.client.submit(
                function,
                self.number,
                self.random.choice(ENDS),
                *inputs,
                key=f"{function.__name__}-{self.number:08x}",
                resources=asked,
                retries=self.random.choice([0, 0, 2]),
                pure=False,
            )
        )

    async def graph(self) -> None:
        """A fan-out and fan-in, sent as one graph; the last alone is kept."""
        numbers = range(self.number + 1, self.number + 7)
        self.number += 6
        keys = [f"node-{number:08x}" for number in numbers]
        graph: dict[str, Any] = {keys[0]: (task, numbers[0], "ends")}
        for key, number in zip(keys[1:5], numbers[1:5], strict=True):
            graph[key] = (other, number, self.random.choice(ENDS), keys[0])
        graph[keys[5]] = (task, numbers[5], "ends", *keys[1:5])
        self.futures.append(self.cluster.client.get(graph, keys[5], sync=False))

    async def many(self) -> None:
        """More tasks of a name than there are threads: they are queued."""
        first = self.number + 1
        self.number += 12
        for number in range(first, first + 12):
            self.futures.append(self.cluster.client.submit(other, number, "ends", pure=False))

    async def open(self) -> None:
        """Let some tasks end."""
        for number in self.random.sample(range(self.number + 1), (self.number + 1) // 2):
            gate(number).set()

    async def cancel(self) -> None:
        """Cancel some tasks."""
        await self.cluster.client.cancel(self.some(2))

    async def release(self) -> None:
        """Let some results go."""
        for future in self.some(3):
            self.futures.remove(future)
            future.release()

    async def retry(self) -> None:
        """Try failed tasks again."""
        failed = [future.key for future in self.futures if future.status == "error"]
        # Not by the client: its `retry` stumbles over tasks that it did not ask for.
        await self.cluster.client.scheduler.retry(keys=failed, client=self.cluster.client.id)

    async def add_worker(self) -> None:
        """One more worker."""
        if len(self.cluster.scheduler.workers) < 5:
            await self.cluster.add_worker(self.random.choice([1, 2]), self.random.choice(WORKERS))

    def worker(self) -> Worker | None:
        """A worker that is there."""
        there = [worker for worker in self.cluster.workers if worker.address in self.cluster.scheduler.workers]
        return self.random.choice(there) if there else None

    async def lose_worker(self) -> None:
        """A worker is gone without a word."""
        worker = self.worker()
        if worker is not None:
            await self.cluster.scheduler.remove_worker(worker.address, stimulus_id="lost", expected=False)

    async def retire(self) -> None:
        """A worker is asked to go, by the plugin."""
        worker = self.worker()
        if worker is not None:
            retiring = self.cluster.plugin.retire([worker.name], idle_only=self.random.random() < 0.5)
            self.background.append(asyncio.ensure_future(retiring))

    async def pause(self) -> None:
        """A worker takes no tasks for a while."""
        worker = self.worker()
        if worker is not None and worker.status in (Status.running, Status.paused):
            worker.status = Status.paused if worker.status is Status.running else Status.running

    async def scatter(self) -> None:
        """Data that no task made; waits for a worker."""
        if self.cluster.scheduler.running:
            with suppress(ValueError):  # the last worker that ran has been paused meanwhile
                self.futures.append(await self.cluster.client.scatter(self.random.random(), broadcast=True))

    async def actor(self) -> None:
        """An actor, which dies with its worker."""
        self.futures.append(self.cluster.client.submit(Holder, actor=True, pure=False))

    async def bound(self) -> None:
        """A task for one worker, which may be gone."""
        address = self.cluster.workers[-1].address if self.cluster.workers else "tcp://127.0.0.1:1"
        self.number += 1
        loose = self.random.random() < 0.3
        self.futures.append(
            self.cluster.client.submit(
                task, self.number, "ends", workers=[address], allow_other_workers=loose, pure=False
            )
        )

    async def install_again(self) -> None:
        """A new plugin takes the place of the one that is there."""
        with pytest.warns(UserWarning, match="overwriting"):
            await self.cluster.scheduler.register_scheduler_plugin(DemandPlugin(0, self.offers), idempotent=False)

    async def restart(self) -> None:
        """All tasks are forgotten, and these workers, which no nanny starts again, are gone."""
        await self.cluster.client.restart(wait_for_workers=False, timeout=5)
        self.futures.clear()

    async def answer(self) -> None:
        """The supervisor asks."""
        answer = await self.cluster.demand()
        self.check()
        assert sum(group["queued"] for group in answer["groups"].values()) + sum(answer["unmatched"].values()) == len(
            self.cluster.scheduler.queued
        ) + len(self.cluster.scheduler.unrunnable)

    async def pass_time(self) -> None:
        """Let messages come and go."""
        await asyncio.sleep(0.03)

    async def run(self, steps: list[str]) -> None:
        """Carry the steps out, then let everything end."""
        watch = asyncio.ensure_future(self.watch())
        ENDING.clear()
        for name in steps:
            step: Callable[[], Coroutine[Any, Any, None]] = getattr(self, name)
            await step()
            self.check()
            for _ in range(self.random.randrange(20)):
                await asyncio.sleep(0)
        ENDING.set()
        for number in range(self.number + 1):
            gate(number).set()
        for worker in self.cluster.workers:
            if worker.status is Status.paused:
                worker.status = Status.running
        for resources in WORKERS:
            await self.cluster.add_worker(2, resources)
        scheduler = self.cluster.scheduler
        await self.cluster.until(
            lambda: (
                watch.done()
                or not any(
                    task.state in ("queued", "processing", "waiting") and not unable(task)
                    for task in scheduler.tasks.values()
                )
            ),
            "all tasks at their end",
        )
        self.check()
        await self.cluster.client.cancel(self.futures, force=True)
        for background in self.background:
            await background
        self.check()
        assert not watch.done() or watch.exception() is None, watch.exception()
        watch.cancel()
        assert self.cluster.plugin.counter.recounts == 0, "the counts had to be put right"


def unable(ts: Any) -> bool:
    """Whether a task waits for one that nobody can run.

    Or for a dead actor: it fails with its worker, and Dask lets a task that was being sent to another worker just then
    wait for it ever after.
    """
    return any(
        needed.state == "no-worker" or (needed.actor and needed.state == "erred") or unable(needed)
        for needed in ts.waiting_on or ()
    )


@pytest.fixture(autouse=True)
def modules_are_known_by_their_files() -> None:
    """Dask asks for the module of what it pickles, the first time at a look at each module's file.

    In a thread beside our loop, which checks at every turn, each of these looks waits its turn: 20 s in all.
    """
    inspect.getmodule(compile("", "of no module", "exec"))


STEPS = {
    "submit": 8,
    "graph": 3,
    "many": 1,
    "open": 5,
    "cancel": 2,
    "release": 2,
    "retry": 2,
    "add_worker": 4,
    "lose_worker": 2,
    "retire": 1,
    "pause": 1,
    "scatter": 1,
    "actor": 1,
    "bound": 1,
    "install_again": 1,
    "restart": 1,
    "answer": 2,
    "pass_time": 4,
}


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    steps=st.lists(
        st.sampled_from([name for name, weight in STEPS.items() for _ in range(weight)]), min_size=5, max_size=40
    ),
    offers=st.sampled_from([OFFERS, OFFERS, None]),
    seed=st.integers(0, 2**32),
)
def test_the_counts_are_those_of_a_count_from_scratch(
    steps: list[str], offers: dict[str, Any] | None, seed: int
) -> None:
    async def scenario() -> None:
        async with dask_cluster(offers) as cluster:
            await Script(cluster, offers, seed).run(steps)

    asyncio.run(scenario())


async def test_a_long_script() -> None:
    """One with all kinds of steps, long enough that each kind of count has been seen not to be zero."""
    chosen = random.Random(1)
    async with dask_cluster(OFFERS) as cluster:
        script = Script(cluster, OFFERS, 1)
        names = [name for name in STEPS if name != "restart"]
        await script.run(chosen.choices(names, [STEPS[name] for name in names], k=250))
    assert script.checks > 1000
    assert min(script.seen.values()) > 10, script.seen
    assert GATES


async def test_counts_that_are_wrong_again_and_again_are_not_put_right_all_the_time() -> None:
    async with dask_cluster() as cluster:
        futures = cluster.client.map(task, range(5), end="ends")
        await cluster.until(lambda: len(cluster.scheduler.tasks) == 5, "five tasks")
        counter = cluster.plugin.counter
        for pause, recounts in ((0, 1), (0, 2), (1e9, 3), (1e9, 3), (0, 3)):
            counter.recount_pause = pause
            counter._ready.popitem()
            await cluster.demand()
            assert counter.recounts == recounts
        del futures


async def test_wrong_counts_are_put_right() -> None:
    async with dask_cluster() as cluster:
        futures = cluster.client.map(task, range(5), end="ends")
        await cluster.until(lambda: len(cluster.scheduler.tasks) == 5, "five tasks")
        cluster.plugin.counter._ready.popitem()
        assert counted(cluster.plugin.counter) == recount(
            cluster.scheduler, None
        )  # by luck: it is the record that lacks
        cluster.plugin.counter.kinds.groups["default"].queued -= 1
        assert (await cluster.demand())["groups"]["default"]["queued"] == 5
        assert cluster.plugin.counter.recounts == 1
        assert counted(cluster.plugin.counter) == recount(cluster.scheduler, None)
        del futures


def test_constant_work_for_each_step_of_a_task() -> None:
    """The steps of a wide graph are as many as its edges, a few times: no step looks at all tasks."""

    class Counting(dict[str, Any]):
        looked_up = 0

        def get(self, *args: Any) -> Any:
            Counting.looked_up += 1
            return super().get(*args)

    async def edges(width: int) -> float:
        async with dask_cluster() as cluster:
            counter = cluster.plugin.counter
            counter._waiting, counter._in_hand = Counting(), Counting()
            await cluster.add_worker(2)
            Counting.looked_up = 0
            graph: dict[str, Any] = {f"in-{number:08x}": (abs, number) for number in range(width)}
            graph |= {f"out-{number:08x}": (max, list(graph)) for number in range(20)}
            last = [key for key in graph if key.startswith("out")]
            await cluster.client.gather(cluster.client.get(graph, last, sync=False))
            assert counter.recounts == 0
            return Counting.looked_up / (20 * width)

    narrow, wide = asyncio.run(edges(20)), asyncio.run(edges(200))
    assert 0.5 < wide <= 3.5
    assert wide < 1.3 * narrow
