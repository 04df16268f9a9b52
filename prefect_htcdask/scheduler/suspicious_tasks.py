"""What the scheduler holds against tasks when a worker vanishes, and taking back what is not their fault.

Dask marks every task that a vanished worker was assigned as suspicious, also those that it had not begun, and fails a
task as `KilledWorker` at the fourth mark (distributed, `Scheduler.remove_worker`). In a batch system most workers that
vanish do so for reasons of the pool. So only the tasks in hand stay marked, and none at all where HTCondor says that it
took the worker away: the supervisor reads that in the job event log and tells it here.

It travels by value to the scheduler (see `demand`): it imports nothing of this package.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

REMEMBERED = 10_000
"""Jobs with vanished workers that are remembered, until word of them comes from HTCondor."""


class SuspiciousTasks:
    """The marks that vanished workers left. The plugin's hooks of the same name call it."""

    def __init__(self) -> None:
        self._workers: dict[str, Any] = {}
        self._marked: OrderedDict[str, list[Any]] = OrderedDict()
        self._pardoned: OrderedDict[str, None] = OrderedDict()

    def add_worker(self, scheduler: Any, worker: str) -> None:
        """Know a worker that joined, given by its address."""
        self._workers[worker] = scheduler.workers[worker]

    def remove_worker(self, scheduler: Any, worker: str) -> None:
        """Take back the marks of tasks that a vanished worker had not begun, and all where it is pardoned."""
        ws = self._workers.pop(worker, None)
        if ws is None:
            return
        removal = next(
            (event for _, event in reversed(scheduler.get_events(worker)) if event.get("action") == "remove-worker"),
            None,
        )
        if removal is None or removal["expected"]:
            return
        tasks = [scheduler.tasks[key] for key in removal["processing-tasks"] if key in scheduler.tasks]
        # The worker's last heartbeat told what it ran; of the rest, it would begin those that come first.
        first = sorted(tasks, key=lambda task: task.priority)[: ws.nthreads]
        begun = [task for task in tasks if task in ws.executing or task in first]
        take_back(task for task in tasks if task not in begun)
        name = str(ws.name)
        if name in self._pardoned:
            del self._pardoned[name]
            take_back(begun)
        elif begun:
            _remember(self._marked, job_part(name), [*self._marked.get(job_part(name), []), *begun])

    def pardon(self, scheduler: Any, names: Iterable[str]) -> None:
        """Take back the marks that these workers left, or will leave: it was the pool that took them away.

        Earlier workers of the same jobs are pardoned with them. Their jobs lived on, so they were evicted too; and the
        number of a job's start, the last part of a name, may have been counted in another way.
        """
        there = {str(ws.name) for ws in self._workers.values()}
        for name in names:
            # A task that was forgotten meanwhile, or failed, is no task of the scheduler's any more.
            marked = self._marked.pop(job_part(name), [])
            take_back(task for task in marked if scheduler.tasks.get(task.key) is task)
            if name in there:
                _remember(self._pardoned, name, None)


def job_part(name: str) -> str:
    """The part of a worker's name that all workers of one job share (`worker.names.worker_name`)."""
    return name.rpartition("-")[0]


def take_back(tasks: Iterable[Any]) -> None:
    """Take one mark back from each of these tasks."""
    for task in tasks:
        if task.suspicious > 0:
            task.suspicious -= 1
            task.prefix.suspicious -= 1


def _remember(memory: OrderedDict[str, Any], name: str, value: Any) -> None:
    memory[name] = value
    while len(memory) > REMEMBERED:
        memory.popitem(last=False)
