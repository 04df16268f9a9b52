"""The plugin on the Dask scheduler that tells a worker when a task which it is given was in other hands before.

Dask gives a task of a lost worker to another one without a word of it. Whoever runs it has to know: the task run goes
on under Prefect's accounting, and one whose result is at hand elsewhere is not run at all (`rerun`). So the tasks that
a worker takes with it are marked in their annotations, which travel with each task to its worker, before the scheduler
sends them to others. It costs nothing while no worker goes.

It travels by value to the scheduler: it imports nothing of this package.
"""

from __future__ import annotations

from typing import Any

from distributed.diagnostics.plugin import SchedulerPlugin

LOST_ANNOTATION = "htcdask-lost"
"""Name of the annotation."""

WORKER_LOST = "htcdask-worker-lost"
"""Topic of the scheduler's events that tells of each worker that vanished."""

REMEMBERED = 10
"""Workers that a mark names, the last ones."""


class LostTasksPlugin(SchedulerPlugin):
    """Marks the tasks that a worker takes with it as it goes.

    A mark has `times` (workers that took the task with them), `workers` (their names), `begun` (whether one of them is
    known to have run it) and `held` (whether its result is, or may be, gone).
    """

    name = "htcdask-lost-work"
    idempotent = True

    def __init__(self) -> None:
        self.scheduler: Any = None
        self.workers: dict[str, Any] = {}

    async def start(self, scheduler: Any) -> None:
        """Know the workers that there are."""
        self.scheduler = scheduler
        self.workers = dict(scheduler.workers)

    def add_worker(self, scheduler: Any, worker: str) -> None:
        """Know one that joined."""
        self.workers[worker] = scheduler.workers[worker]

    def remove_worker(self, scheduler: Any, worker: str, **kwargs: Any) -> None:
        """Forget one that left; what it took with it is marked by then."""
        self.workers.pop(worker, None)

    def log_event(self, topic: str, msg: Any) -> None:
        """Mark what a worker takes with it: the scheduler logs that before it gives it to others.

        See `Scheduler.remove_worker` in distributed; it stands in the topic "all" with the worker's address.
        """
        if topic != "all" or not isinstance(msg, dict) or msg.get("action") != "remove-worker":
            return
        ws = self.workers.get(msg["worker"])
        if ws is None:
            return
        tasks = self.scheduler.tasks
        for key in msg["processing-tasks"]:
            if (task := tasks.get(key)) is not None:
                self.mark(task, str(ws.name), begun=task in ws.executing)
        todo = [tasks[key] for key in msg["lost-computed-tasks"] if key in tasks]
        seen = set()
        while todo:
            task = todo.pop()
            if task.key in seen or not (task.who_wants or task.waiters or task.state == "released"):
                continue
            seen.add(task.key)
            self.mark(task, str(ws.name), held=True)
            # To compute it again, Dask computes its inputs again, where those were let go of.
            todo += [needed for needed in task.dependencies if needed.state == "released"]
        if not msg["expected"]:
            self.scheduler.log_event(WORKER_LOST, {"worker": str(ws.name)})

    def mark(self, task: Any, worker: str, begun: bool = False, held: bool = False) -> None:
        """Add a loss to a task's mark."""
        annotations = task.annotations or {}
        earlier = annotations.get(LOST_ANNOTATION) or {"times": 0, "workers": [], "begun": False, "held": False}
        # Tasks that were submitted together may share one mapping of annotations.
        task.annotations = {
            **annotations,
            LOST_ANNOTATION: {
                "times": earlier["times"] + 1,
                "workers": [*earlier["workers"], worker][-REMEMBERED:],
                "begun": earlier["begun"] or begun,
                "held": earlier["held"] or held,
            },
        }
