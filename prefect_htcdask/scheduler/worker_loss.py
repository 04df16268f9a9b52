"""The plugin on the Dask scheduler that says what the loss of a worker means for the tasks that it had.

Dask gives them to other workers without a word, and marks each as suspicious, also those that the worker had not begun;
at the fourth mark it fails a task as `KilledWorker` (distributed, `Scheduler.remove_worker`). Here, of one loss:

- Whoever runs such a task next has to know that it was in other hands: the task run goes on under Prefect's
  accounting, and one whose result is at hand elsewhere is not run at all (`rerun`). So its annotations, which travel
  with it, say so before the scheduler sends it to another worker.
- Tasks that the worker had not begun are under no suspicion, and none is where HTCondor took the worker away: the
  supervisor reads that in the job event log and tells it here.
- What breaks a client's connection, such as the end of a gateway's proxy, may break those of all workers with it, one
  after the other, and a task may be handed from one to the next. So suspicion counts only once it is seen that no
  client was lost at the same time (`client_recovery`).

It costs nothing while no worker goes. It travels by value to the scheduler: it imports nothing of this package.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from distributed.diagnostics.plugin import SchedulerPlugin

WORKER_LOSS = "htcdask-worker-loss"
"""Name of the plugin."""

LOST_ANNOTATION = "htcdask-lost"
"""Name of the annotation."""

WORKER_LOST = "htcdask-worker-lost"
"""Topic of the scheduler's events that tells of each worker that vanished."""

AT_ONCE = 1.0
"""Seconds between the losses of connections that are taken to have the same cause."""

NAMED_WORKERS = 10
"""Workers that a task's annotation names, the last ones."""

REMEMBERED = 10_000
"""Jobs with vanished workers that are remembered, until word of them comes from HTCondor."""


@dataclass(eq=False)
class Loss:
    """A worker that vanished.

    Attributes:
        begun: the tasks that it had begun, and that are suspected.
        when: the time of `time.monotonic`.
        counts: whether they are marked for it yet.
    """

    begun: list[Any]
    when: float
    counts: bool = False


class WorkerLossPlugin(SchedulerPlugin):
    """Annotates the tasks of lost workers, and is the only one to change the number of their marks.

    Args:
        at_once: seconds between the losses of connections that are taken to have the same cause.
    """

    name = WORKER_LOSS
    idempotent = True

    def __init__(self, at_once: float = AT_ONCE) -> None:
        self.scheduler: Any = None
        self.at_once = at_once
        self.workers: dict[str, Any] = {}
        self.client_lost_at = -math.inf
        self.losses: OrderedDict[str, list[Loss]] = OrderedDict()
        self.pardoned: OrderedDict[str, None] = OrderedDict()

    async def start(self, scheduler: Any) -> None:
        """Know the workers that there are, and take the supervisor's word."""
        self.scheduler = scheduler
        self.workers = dict(scheduler.workers)
        scheduler.handlers["htcdask_pardon"] = self.pardon

    def add_worker(self, scheduler: Any, worker: str) -> None:
        """Know one that joined."""
        self.workers[worker] = scheduler.workers[worker]

    def remove_worker(self, scheduler: Any, worker: str, **kwargs: Any) -> None:
        """Forget one that left; what it took with it is dealt with by then."""
        self.workers.pop(worker, None)

    def log_event(self, topic: str, msg: Any) -> None:
        """Hear of a worker that goes: the scheduler logs that before it gives its tasks to others.

        See `Scheduler.remove_worker` in distributed; it stands in the topic "all" with the worker's address.
        """
        if topic != "all" or not isinstance(msg, dict) or msg.get("action") != "remove-worker":
            return
        ws = self.workers.get(msg["worker"])
        if ws is None:
            return
        self.annotate(ws, msg["processing-tasks"], msg["lost-computed-tasks"])
        if not msg["expected"]:
            self.suspect(ws, msg["processing-tasks"])
            self.scheduler.log_event(WORKER_LOST, {"worker": str(ws.name)})

    def annotate(self, ws: Any, processing: Iterable[str], computed: Iterable[str]) -> None:
        """Have the workers that get these tasks next know that they were in other hands.

        A task's annotation has `times` (workers that took the task with them), `workers` (their names), `begun`
        (whether one of them is known to have run it) and `held` (whether its result is, or may be, gone).
        """
        tasks, name = self.scheduler.tasks, str(ws.name)
        for key in processing:
            if (task := tasks.get(key)) is not None:
                add_loss(task, name, begun=task in ws.executing)
        todo = [tasks[key] for key in computed if key in tasks]
        seen = set()
        while todo:
            task = todo.pop()
            if task.key in seen or not (task.who_wants or task.waiters or task.state == "released"):
                continue
            seen.add(task.key)
            add_loss(task, name, held=True)
            # To compute it again, Dask computes its inputs again, where those were let go of.
            todo += [needed for needed in task.dependencies if needed.state == "released"]

    def suspect(self, ws: Any, processing: Iterable[str]) -> None:
        """Take a vanished worker's marks back: those of tasks that it had begun, until it is settled who was lost."""
        tasks = [self.scheduler.tasks[key] for key in processing if key in self.scheduler.tasks]
        add_marks(tasks, -1)
        name = str(ws.name)
        if name in self.pardoned:
            del self.pardoned[name]
            return
        # The worker's last heartbeat told what it ran; of the rest, it would begin those that come first.
        first = sorted(tasks, key=lambda task: task.priority)[: ws.nthreads]
        loss = Loss([task for task in tasks if task in ws.executing or task in first], time.monotonic())
        if loss.begun:
            job = job_part(name)
            remember(self.losses, job, [*self.losses.get(job, []), loss])
            asyncio.get_running_loop().call_later(self.at_once, self.settle, job, loss)

    def settle(self, job: str, loss: Loss) -> None:
        """A loss counts against what the worker had begun, unless a client was lost at the same time."""
        if abs(self.client_lost_at - loss.when) > self.at_once:
            loss.counts = True
            add_marks(self.alive(loss.begun), 1)
        elif loss in (of_job := self.losses.get(job, [])):
            of_job.remove(loss)

    async def pardon(self, names: list[str]) -> None:
        """Hold the loss of these workers against no task: HTCondor took them away, or will.

        Earlier workers of the same jobs are pardoned with them. Their jobs lived on, so they were evicted too; and the
        number of a job's start, the last part of a name, may have been counted in another way.
        """
        there = {str(ws.name) for ws in self.workers.values()}
        for name in names:
            for loss in self.losses.pop(job_part(name), []):
                if loss.counts:
                    add_marks(self.alive(loss.begun), -1)
                loss.begun = []
            if name in there:
                remember(self.pardoned, name, None)

    def client_lost(self) -> None:
        """A client's connection broke that is about to come back: workers lost with it are no task's fault."""
        self.client_lost_at = time.monotonic()

    def alive(self, tasks: Iterable[Any]) -> list[Any]:
        """Those that are tasks of the scheduler's still: one that was forgotten, or failed, may not be."""
        return [task for task in tasks if self.scheduler.tasks.get(task.key) is task]


def job_part(name: str) -> str:
    """The part of a worker's name that all workers of one job share (`worker.names.worker_name`)."""
    return name.rpartition("-")[0]


def add_marks(tasks: Iterable[Any], number: int) -> None:
    """Add to the number of workers that each task is suspected to have killed; it does not get below none."""
    for task in tasks:
        if task.suspicious + number >= 0:
            task.suspicious += number
            task.prefix.suspicious += number


def add_loss(task: Any, worker: str, begun: bool = False, held: bool = False) -> None:
    """Add a lost worker to a task's annotation."""
    annotations = task.annotations or {}
    earlier = annotations.get(LOST_ANNOTATION) or {"times": 0, "workers": [], "begun": False, "held": False}
    # Tasks that were submitted together may share one mapping of annotations.
    task.annotations = {
        **annotations,
        LOST_ANNOTATION: {
            "times": earlier["times"] + 1,
            "workers": [*earlier["workers"], worker][-NAMED_WORKERS:],
            "begun": earlier["begun"] or begun,
            "held": earlier["held"] or held,
        },
    }


def remember(memory: OrderedDict[str, Any], name: str, value: Any) -> None:
    """Keep a value under a name, and forget the oldest of too many."""
    memory[name] = value
    while len(memory) > REMEMBERED:
        memory.popitem(last=False)
