"""What goes on, as the flow run's page shows it: kept by the supervisor, and told seldom, however many the jobs."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec

from prefect_htcdask.supervisor.policy import Supply
from prefect_htcdask.supervisor.protocol import ReportPlan
from prefect_htcdask.supervisor.report.timeline import Timeline, Workers
from prefect_htcdask.supervisor.report.usage import group_usage, job_rows, job_states
from prefect_htcdask.supervisor.worker_group import WorkerGroup
from prefect_htcdask.supervisor.worker_table import WorkerTable

logger = logging.getLogger(__name__)

P = ParamSpec("P")


def harmless(look: Callable[P, None]) -> Callable[P, None]:
    """Have what fails here be told to the log alone: workers are looked after without it."""

    @functools.wraps(look)
    def looking(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            look(*args, **kwargs)
        except Exception:
            logger.exception("the flow run's progress is not known any more")

    return looking


class Progress:
    """Looks on, and tells.

    Args:
        worker_table: the jobs and workers.
        groups: the worker groups.
        plan: how much to tell, and how often; `None`: nothing before the end.
        say: sends a message to the flow's process.
    """

    def __init__(
        self,
        worker_table: WorkerTable,
        groups: Mapping[str, WorkerGroup],
        plan: ReportPlan | None,
        say: Callable[[dict[str, Any]], None],
    ) -> None:
        self._worker_table = worker_table
        self._groups = groups
        self._plan = plan
        self._say = say
        self._began = time.time()
        self._timeline = Timeline(list(groups), self._began)
        self._workers: dict[str, Workers] = {}
        self._queued = self._peak_queued = 0
        self._known = 0
        self._done: dict[str, int] = {}
        self._spent: dict[str, float] = {}
        self._told: dict[str, Any] = {}
        self._tell_at = 0.0

    @harmless
    def saw(self, answer: Mapping[str, Any] | None, supplies: Mapping[str, Supply], now: float) -> None:
        """Take in what one round saw.

        Args:
            answer: what the scheduler said, or `None` where it said nothing: then the tasks are as they were.
            supplies: the workers of each group.
            now: Unix time in seconds.
        """
        if answer is not None:
            told = answer["groups"]
            unserved = sum(answer.get("unmatched", {}).values())
            self._queued = unserved + sum(group.get("queued", 0) + group.get("stacked", 0) for group in told.values())
            self._peak_queued = max(self._peak_queued, self._queued)
            self._done = {name: group.get("done", 0) for name, group in told.items()}
            self._known = sum(self._done.values()) + answer.get("unfinished", 0)
            self._spent = {name: group.get("spent", 0.0) for name, group in told.items()}
        self._workers = {
            name: Workers(len(supply.pending), len(supply.busy), len(supply.idle)) for name, supply in supplies.items()
        }
        self._timeline.saw(now, self._queued, self._workers)

    @harmless
    def tell(self, now: float) -> None:
        """Tell the flow's process what has changed, if it is time to.

        Args:
            now: the time, on the monotonic clock.
        """
        if self._plan is None or now < self._tell_at:
            return
        self._tell_at = now + self._plan.interval
        told = self._now(self._plan.rows)
        if told != self._told:
            self._told = told
            self._say({"kind": "progress", **told})

    def _now(self, rows: int) -> dict[str, Any]:
        specs = {name: group.spec for name, group in self._groups.items()}
        return {
            "tasks": {"done": sum(self._done.values()), "known": self._known},
            "queued": self._queued,
            "workers": {name: workers._asdict() for name, workers in self._workers.items()},
            "states": job_states(self._worker_table),
            "jobs": job_rows(self._worker_table, specs, rows, time.time()),
        }

    def report(self, ended_because: str) -> dict[str, Any]:
        """What the cluster did from its first to its last moment, under `report`; nothing where nobody wants it."""
        if self._plan is None:
            return {}
        try:
            return {"report": self._account(self._plan.rows, ended_because)}
        except Exception:
            logger.exception("there is no report")
            return {}

    def _account(self, rows: int, ended_because: str) -> dict[str, Any]:
        now = time.time()
        self._timeline.until(now)
        return {
            **self._now(rows),
            "began": self._began,
            "ended": now,
            "ended_because": ended_because,
            "peak_queued": self._peak_queued,
            "groups": {name: self._group_usage(group, now) for name, group in self._groups.items()},
            "timeline": self._timeline.told(),
        }

    def _group_usage(self, group: WorkerGroup, now: float) -> dict[str, Any]:
        name = group.name
        done, spent = self._done.get(name, 0), self._spent.get(name, 0.0)
        seconds = self._timeline.seconds()[name]
        return {
            **group_usage(self._worker_table, name, group.spec, group.boots, done, spent, now),
            **{f"{what}_seconds": total for what, total in seconds._asdict().items()},
            "settings": group.settings,
        }
