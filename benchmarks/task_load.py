"""Workers that several runners share, and what a flow of many tasks costs each process that takes part in it."""

from __future__ import annotations

import json
import os
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import httpx
import psutil
from distributed import Client

from benchmarks.parts import pool
from benchmarks.task_flow import Order
from prefect_htcdask import HTCGatewayCluster

MEMORY, DISK = "600 MiB", "100 MiB"
IDLE_SECONDS = 10.0
"""For how long the workers' CPU time is looked at while they have nothing to do."""

WARM_UP = 250
"""Tasks that each worker has run before anything is measured."""

SETTLE_TIMEOUT = 300.0
"""Seconds that the API may take to show the last task run, once the flow has its result."""

LOOK_EVERY = 0.25


@dataclass(frozen=True)
class Spent:
    """What one flow took. Times in seconds; "per task" is of those task runs that were measured.

    Attributes:
        tasks: task runs.
        seconds: from the first submit to the last result.
        settled_seconds: from the first submit until the API shows every task run as completed; `None`: not waited for.
        submitting_seconds: until the last submit returned.
        flow_cpu_per_task: CPU time of the flow's process, until the last result.
        workers_cpu_per_task: CPU time of all workers until their last event is sent, less what they take when idle.
        scheduler_cpu_per_task: the same for the Dask scheduler.
        server_cpu_per_task: the same for the Prefect server until it shows all; it is asked for its count meanwhile.
        first_bytes, most_bytes, last_bytes: memory that the flow's process has for itself alone (USS).
    """

    tasks: int
    seconds: float
    settled_seconds: float | None
    submitting_seconds: float
    flow_cpu_per_task: float
    workers_cpu_per_task: float
    scheduler_cpu_per_task: float
    server_cpu_per_task: float
    first_bytes: int | None = None
    most_bytes: int | None = None
    last_bytes: int | None = None

    @property
    def rate(self) -> float:
        """Task runs each second, to the last result."""
        return self.tasks / self.seconds

    @property
    def settled_rate(self) -> float:
        """Task runs each second that the API shows as completed."""
        assert self.settled_seconds is not None, "it was not waited for"
        return self.tasks / self.settled_seconds

    def figures(self) -> dict[str, Any]:
        """For the JSON line."""
        figures = {name: value for name, value in asdict(self).items() if value is not None}
        figures["tasks_per_second"] = self.rate
        if self.settled_seconds is not None:
            figures["settled_tasks_per_second"] = self.settled_rate
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in figures.items()}


def on_average(rounds: list[Spent]) -> Spent:
    """The mean of what several flows took that were measured alike."""
    names = [field.name for field in fields(Spent) if getattr(rounds[0], field.name) is not None]
    means = {name: statistics.mean(getattr(spent, name) for spent in rounds) for name in names}
    return replace(rounds[0], **means)


@dataclass
class Workers:
    """A live cluster whose processes are watched.

    Attributes:
        address, security: how runners connect to its scheduler.
        server, scheduler, workers: the processes that take part in all flows.
        idle: seconds of CPU time that each takes each second when it has nothing to do, by process id.
    """

    address: str
    security: Any
    client: Client
    server: psutil.Process
    scheduler: psutil.Process
    workers: list[psutil.Process]
    idle: dict[int, float]

    @property
    def processes(self) -> list[psutil.Process]:
        """The Prefect server, the scheduler, then the workers."""
        return [self.server, self.scheduler, *self.workers]

    def measure(self, who: str, shape: str, tasks: int, *, memory: bool = False, settle: bool = True) -> Spent:
        """Run one flow in a process of its own, on these workers.

        Args:
            who: whose runner.
            shape: of the flow.
            tasks: how many.
            memory: whether to look at the flow's memory, too.
            settle: whether to wait until the API shows all; if not, nothing is said of it.
        """
        order = Order(who, shape, tasks, 10 * len(self.workers), self.address, self.security, memory)
        before = cpu_times(self.processes)
        began = time.time()
        figures = run_order(order)[0]
        # What is still queued of the tasks' events and logs belongs to them; afterwards workers are idle for longer
        # than the tasks took, which is not known well enough to be subtracted.
        self.client.run(send_what_is_queued)
        scheduler, *workers = self._used_since(before, began, self.processes[1:])
        settled = wait_until_settled(figures["flow_run_id"], order.task_runs) if settle else None
        (server,) = self._used_since(before, began, self.processes[:1])
        spent = Spent(
            tasks=tasks,
            seconds=figures["seconds"],
            settled_seconds=None if settled is None else settled - figures["started"],
            submitting_seconds=figures["submitting_seconds"],
            flow_cpu_per_task=figures["cpu_seconds"] / tasks,
            # The few tasks of the warm-up cost these processes as much as others.
            workers_cpu_per_task=sum(workers) / order.task_runs,
            scheduler_cpu_per_task=scheduler / order.task_runs,
            server_cpu_per_task=server / order.task_runs,
            **{name: figures[name] for name in ("first_bytes", "most_bytes", "last_bytes") if name in figures},
        )
        api = "" if settled is None else f", API {spent.settled_rate:.1f}/s"
        print(
            f"{who} {shape}, {len(self.workers)} workers, {tasks} tasks: {spent.rate:.1f}/s{api}; "
            f"CPU per task: flow {1e3 * spent.flow_cpu_per_task:.2f} ms, workers "
            f"{1e3 * spent.workers_cpu_per_task:.2f} ms, scheduler {1e3 * spent.scheduler_cpu_per_task:.2f} ms, "
            f"server {1e3 * spent.server_cpu_per_task:.2f} ms",
            file=sys.stderr,
            flush=True,
        )
        return spent

    def _used_since(self, before: dict[int, float], began: float, processes: list[psutil.Process]) -> list[float]:
        """CPU time of processes since they had used this much, in seconds, less what they take when idle."""
        lasted = time.time() - began
        return [max(0.0, now - before[pid] - self.idle[pid] * lasted) for pid, now in cpu_times(processes).items()]


@contextmanager
def workers(count: int, **environment: str) -> Iterator[Workers]:
    """`count` HTCondor workers of one thread each behind a gateway, all there, while the block lasts.

    `environment` is for the workers.

    They are started by our cluster for both runners: both get its scheduler's address and connect to it themselves.
    """
    with (
        pool(slots=max(count, 4)),
        HTCGatewayCluster(
            memory=MEMORY, disk=DISK, cpus=1, nthreads=1, n_workers=count, environment=environment
        ) as cluster,
        cluster.get_client(set_as_default=False) as client,
    ):
        client.wait_for_workers(count, timeout=180)
        client.run(preload())  # for both runners
        pids = sorted(client.run(os.getpid).values())
        found = Workers(
            cluster.scheduler_address,
            cluster.security,
            client,
            server_process(),
            psutil.Process(client.run_on_scheduler(os.getpid)),
            [psutil.Process(pid) for pid in pids],
            {},
        )
        # Imports, first connections and caches have had their time then, as in the floor's process.
        first = Order("ours", "map", WARM_UP * count, 0, found.address, found.security)
        first_run = run_order(first)[0]["flow_run_id"]
        client.run(send_what_is_queued)
        wait_until_settled(first_run, first.task_runs)
        time.sleep(2)
        before = cpu_times(found.processes)
        time.sleep(IDLE_SECONDS)
        now = cpu_times(found.processes)
        found.idle.update({pid: (now[pid] - before[pid]) / IDLE_SECONDS for pid in now})
        idle = statistics.mean(found.idle[pid] for pid in pids)
        print(f"{count} workers; each takes {1e3 * idle:.0f} ms of CPU a second when idle", file=sys.stderr, flush=True)
        yield found


def preload() -> Callable[..., Any]:
    """Does on a worker what the preload of a flow run's own workers does; it travels by value."""

    async def set_up(dask_worker: Any) -> None:
        from prefect_htcdask.worker.run_task import dask_setup

        await dask_setup(dask_worker)

    return set_up


async def send_what_is_queued() -> None:
    """Have a worker send its queued events and logs; runs in its event loop, where Prefect's services cannot wait."""
    import asyncio

    from prefect_htcdask.worker.run_task import flush

    await asyncio.to_thread(flush, 300.0)


def cpu_times(processes: list[psutil.Process]) -> dict[int, float]:
    """CPU time, in seconds, by process id."""
    return {process.pid: (times := process.cpu_times()).user + times.system for process in processes}


def run_order(order: Order) -> list[dict[str, Any]]:
    """Run a flow in a process of its own; its figures, for each flow run."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.task_flow"],
        input=pickle.dumps(vars(order)),
        capture_output=True,
        timeout=3600,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the flow of {order.who} failed:\n{done.stderr.decode(errors='replace')[-4000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(b"{")]


def server_process() -> psutil.Process:
    """The Prefect server that this process has started."""
    for process in psutil.Process().children(recursive=True):
        command = process.cmdline()
        if "prefect" in command and "server" in command:
            return process
    raise RuntimeError("no Prefect server runs")


def wait_until_settled(flow_run_id: str, task_runs: int) -> float:
    """When the API showed that many completed task runs of a flow run, as Unix time in seconds."""
    wanted = {
        "flow_runs": {"id": {"any_": [flow_run_id]}},
        "task_runs": {"state": {"type": {"any_": ["COMPLETED"]}}},
    }
    deadline = time.monotonic() + SETTLE_TIMEOUT
    with httpx.Client(base_url=os.environ["PREFECT_API_URL"], timeout=60) as api:
        while (shown := api.post("/task_runs/count", json=wanted).raise_for_status().json()) < task_runs:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{SETTLE_TIMEOUT:.0f} s after its end the API shows {shown} of {task_runs} task runs as completed"
                )
            time.sleep(LOOK_EVERY)
    return time.time()


def floor(tasks: int) -> float:
    """CPU time, in seconds per task run, of the engine alone: `run_task_sync` in a loop, in one process.

    It returns when the API shows them all: a server that catches up takes its CPU time from what is measured next.
    """
    order = Order("floor", "loop", tasks, warm_up=50)
    figures = run_order(order)[0]
    seconds = float(figures["cpu_seconds"]) / tasks
    wait_until_settled(figures["flow_run_id"], order.task_runs)
    print(f"the engine alone: {1e3 * seconds:.2f} ms of CPU per task run", file=sys.stderr, flush=True)
    return seconds
