"""Why task runs were lost: the last that HTCondor said of each worker's job, and the exception that names it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import distributed

from prefect_htcdask.compat.dask import error_of
from prefect_htcdask.errors import TaskRunLost
from prefect_htcdask.runner.futures.pending_result import PendingResult
from prefect_htcdask.worker.names import job_of_worker

REMEMBERED = 5_000
"""Jobs, and task runs, of which the last word is kept."""

PATIENCE = 5.0
"""Seconds that a lost task run waits at most for HTCondor's word on the job; the job event log has it after Dask."""

_ENDS = ("evicted", "held", "removed", "exited")


class JobOutcomes:
    """The last that the supervisor process said of each job; `take` its messages."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hosts: OrderedDict[str, str] = OrderedDict()
        self._outcomes: OrderedDict[str, str] = OrderedDict()
        self._lost_tasks: OrderedDict[str, list[str]] = OrderedDict()

    def take(self, message: dict[str, Any]) -> None:
        """Take a message of the kind "job"; see `supervisor.job_message`."""
        job, what, reason = (str(message.get(name) or "") for name in ("job_id", "what", "reason"))
        with self._lock:
            if message.get("host"):
                _remember(self._hosts, job, str(message["host"]))
            if what == "started":
                # What ended its last start is no news any more.
                self._outcomes.pop(job, None)
            elif what in _ENDS:
                told = reason.strip()
                _remember(self._outcomes, job, told if told.startswith(what) else f"{what}: {told}".rstrip(": "))

    def record_lost_task(self, key: str, workers: Iterable[str]) -> None:
        """Take that these workers took a Dask task with them, one after the other."""
        with self._lock:
            _remember(self._lost_tasks, key, list(workers))

    def workers_that_took(self, key: str) -> list[str]:
        """Names of the workers that are known to have taken a Dask task with them."""
        with self._lock:
            return self._lost_tasks.get(key, [])

    def is_known(self, worker: str) -> bool:
        """Whether it is known why a worker's job ended; a worker that is none of our jobs has nothing to be known."""
        job = job_of_worker(worker)
        with self._lock:
            return job is None or job in self._outcomes

    def describe(self, worker: str) -> str:
        """A worker in words: its job, where that ran and why it ended."""
        job = job_of_worker(worker)
        if job is None:
            return f"worker {worker}"
        with self._lock:
            host, outcome = self._hosts.get(job), self._outcomes.get(job)
        where = f" on {host}" if host else ""
        return f"HTCondor job {job}{where}, {outcome or 'of whose end HTCondor has not told yet'}"

    async def wait_for(self, worker: str, patience: float = PATIENCE) -> None:
        """Wait until it is known why a worker's job ended, `patience` seconds at most."""
        deadline = time.monotonic() + patience
        while not self.is_known(worker) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)


def last_worker(result: PendingResult) -> str | None:
    """Name of the worker with which Dask gave a task up, after several that died with it; else `None`."""
    error = error_of(result.dask_future)
    if not isinstance(error, distributed.KilledWorker):
        return None
    last: Any = error.last_worker
    name = str(getattr(last, "name", "") or "")
    return name if job_of_worker(name) else str(getattr(last, "address", last))


def crash_exception(result: PendingResult, job_outcomes: JobOutcomes | None = None) -> BaseException:
    """The exception with which a task run ended that Dask could not bring to a state of its own."""
    wrapped = result.dask_future
    about = f"task run {result.task_run_id} ({result.task_name or 'unnamed'})"
    if (error := error_of(wrapped)) is not None:
        if not isinstance(error, distributed.KilledWorker):
            return error
        if error.task != wrapped.key:
            return TaskRunLost(f"{about} could not run: {error.task}, which it needs, was lost with its worker")
        return TaskRunLost(
            f"{about} was lost: {error.allowed_failures + 1} worker(s) died while they had it"
            f"{_named(last_worker(result) or '', str(error.task), job_outcomes or JobOutcomes())}"
        )
    reason = getattr(getattr(wrapped, "_state", None), "exception", None)
    if wrapped.status == "cancelled":
        return TaskRunLost(f"{about} was lost: Dask cancelled it ({reason or 'no reason given'})")
    return TaskRunLost(f"{about} was lost: its result left the cluster with its worker ({wrapped.status})")


def _named(last: str, key: str, job_outcomes: JobOutcomes) -> str:
    earlier = [worker for worker in job_outcomes.workers_that_took(key) if worker != last]
    named = f", the last of them {job_outcomes.describe(last)}"
    if earlier:
        named += f". Before that: {'; '.join(job_outcomes.describe(worker) for worker in earlier)}"
    if job_of_worker(last) is None:
        named += ". A task that takes more memory than its worker has ends so; the log of that worker tells"
    return named


def _remember(memory: OrderedDict[str, Any], name: str, value: Any) -> None:
    memory[name] = value
    memory.move_to_end(name)
    while len(memory) > REMEMBERED:
        memory.popitem(last=False)
