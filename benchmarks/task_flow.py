"""One flow of many no-op tasks, in a process of its own: ``python -m benchmarks.task_flow``.

Takes the fields of its `Order`, pickled, from stdin, since the cluster's key is among them, and prints one line of JSON
for each flow run: what `measure` returns. A few tasks run first, so that connecting, importing and the first hydration
do not count for either runner.
"""

from __future__ import annotations

import json
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import psutil
from prefect import flow, task
from prefect.futures import PrefectFutureList
from prefect.runtime import flow_run

WIDTH = 100
"""Task runs in each level of the DAG."""
MEMORY_SAMPLES_EVERY = 0.2
"""Seconds between two looks at this process's memory."""


@dataclass(frozen=True)
class Order:
    """What to run, and where.

    Attributes:
        who: "ours", "peer" (DaskTaskRunner), or "floor": the engine alone, called in a loop, without any runner.
        shape: "map", "submit" or "dag".
        tasks: task runs that are measured.
        warm_up: task runs before that.
        address: the Dask scheduler's; none for the floor.
        security: what its TLS asks for.
        memory: whether to look at this process's memory, too, which takes time of its own.
        runs: flow runs, one after another, that share the tasks.
    """

    who: str
    shape: str
    tasks: int
    warm_up: int = 0
    address: str | None = None
    security: Any = None
    memory: bool = False
    runs: int = 1

    @property
    def task_runs(self) -> int:
        """How many task runs a flow run has in all."""
        return self.tasks // self.runs + self.warm_up


@task
def nothing(x: Any, y: Any = None) -> int:
    """A no-op task."""
    return 0


def runner(order: Order) -> Any:
    """The task runner under test; both connect to the same scheduler in the same way."""
    from prefect_dask import DaskTaskRunner

    from prefect_htcdask import HTCDaskTaskRunner

    made = {"ours": HTCDaskTaskRunner, "peer": DaskTaskRunner}[order.who]
    return made(address=order.address, client_kwargs={"security": order.security} if order.security else {})


def by_map(count: int) -> PrefectFutureList[Any]:
    """All in one map."""
    return nothing.map(range(count))


def by_submit(count: int) -> list[Any]:
    """One submit for each."""
    return [nothing.submit(number) for number in range(count)]


def by_dag(count: int) -> list[Any]:
    """Levels of `WIDTH`, each task run with two futures of the level before as its arguments."""
    level: list[Any] = [nothing.submit(number) for number in range(WIDTH)]
    futures = list(level)
    for _ in range(count // WIDTH - 1):
        level = [nothing.submit(level[i], level[(i + 1) % WIDTH]) for i in range(WIDTH)]
        futures += level
    return futures


SHAPES: dict[str, Callable[[int], list[Any]]] = {"map": by_map, "submit": by_submit, "dag": by_dag}


def results(futures: list[Any]) -> list[Any]:
    """All results, as users ask for them: at once for a map, one after another for futures of their own."""
    return futures.result() if isinstance(futures, PrefectFutureList) else [future.result() for future in futures]


def through_runner(order: Order) -> dict[str, Any]:
    """The body of the flow, for a runner."""
    shape = SHAPES[order.shape]
    if order.warm_up:
        results(by_map(order.warm_up))
    with watched_memory(order.memory) as memory:
        started, cpu = time.time(), time.process_time()
        futures = shape(order.tasks // order.runs)
        submitted = time.time()
        results(futures)
        figures = times(started, cpu)
    return {**figures, "submitting_seconds": submitted - started, **memory}


def through_engine(order: Order) -> dict[str, Any]:
    """The body of the flow, for the floor: what the engine itself takes for each task run, its events sent."""
    from prefect.events.worker import EventsWorker
    from prefect.task_engine import run_task_sync

    def one(number: int) -> None:
        state: Any = run_task_sync(task=nothing, parameters={"x": number, "y": None}, return_type="state")
        assert state.is_completed()

    for number in range(order.warm_up):
        one(number)
    EventsWorker.drain_all(timeout=60)
    started, cpu = time.time(), time.process_time()
    for number in range(order.tasks):
        one(number)
    EventsWorker.drain_all(timeout=60)
    return times(started, cpu)


def times(started: float, cpu: float) -> dict[str, float]:
    """Since then: wall time, as a clock that other processes share tells it, and CPU time of this process."""
    ended = time.time()
    return {
        "started": started,
        "ended": ended,
        "seconds": ended - started,
        "cpu_seconds": time.process_time() - cpu,
    }


@contextmanager
def watched_memory(really: bool) -> Iterator[dict[str, int]]:
    """Note the memory of this process alone (USS, bytes): at the start, at most, and at the end."""
    found: dict[str, int] = {}
    if not really:
        yield found
        return
    process, over = psutil.Process(), threading.Event()

    def look() -> int:
        return int(process.memory_full_info().uss)

    def watch() -> None:
        while not over.wait(MEMORY_SAMPLES_EVERY):
            found["most_bytes"] = max(found["most_bytes"], look())

    found["first_bytes"] = found["most_bytes"] = look()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()
        found["last_bytes"] = look()
        found["most_bytes"] = max(found["most_bytes"], found["last_bytes"])


def measure(order: Order) -> dict[str, Any]:
    """Run the flow; its figures, and the id of its flow run."""

    options: dict[str, Any] = {} if order.who == "floor" else {"task_runner": runner(order)}
    body = through_engine if order.who == "floor" else through_runner
    # The flow travels to workers, which have no need of the cluster's key.
    plain = replace(order, address=None, security=None)

    def many_tasks() -> dict[str, Any]:
        return {**body(plain), "flow_run_id": str(flow_run.id)}

    answer: dict[str, Any] = flow(many_tasks, name=f"{order.shape}-{order.who}", **options)()
    return answer


if __name__ == "__main__":
    # An `Order` of this module: workers cannot import it by any other name.
    given = Order(**pickle.load(sys.stdin.buffer))
    for _ in range(given.runs):
        print(json.dumps(measure(given)), flush=True)
