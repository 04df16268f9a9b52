"""One row of the matrix: what is measured after the fault, the same for all, and its record."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from prefect_htcdask.runner.states.reporter import UNFINISHED
from tests.faults.arena import Arena, Unknown
from tests.faults.flow_process import FlowProcess
from tests.support.waiting import PATIENCE, slowness

RESULTS_VARIABLE = "HTCDASK_FAULTS_RESULTS"
"""Environment variable with the path of the file that takes the records, one line of JSON each."""

SETTLE = 30.0 * PATIENCE
"""Seconds in which the API may still hear of states that were reported before a process ended."""
SWEEP_WITHIN = 120.0 * PATIENCE
"""Seconds for the sweep, which gives a dead process's last words half a minute."""


@dataclass
class Row:
    """What became of one fault.

    Attributes:
        name: of the row.
        fault: what was done, in a few words.
        flow: the flow runs' final states.
        not_terminal: task runs that did not end.
        swept: whether the sweep was run first, since no process survived that could have told.
        lost: results that the flow had collected and that were lost, or computed again.
        again: executions of tasks beyond the first of each.
        jobs: left in the queue in any state; `jobs_after` is when there were none, in seconds, `jobs_bound` the most
            that the row allows.
        clusters: gateway clusters left; `clusters_after` and `clusters_bound` likewise.
        complaints: what is not as it should be.
        not_run: why the row could not be run here; empty where it was.
        seconds: that the row took.
    """

    name: str
    fault: str = ""
    flow: str = ""
    not_terminal: int | None = None
    swept: bool = False
    lost: int | None = None
    again: int | None = None
    jobs: int | None = None
    jobs_after: float | None = None
    jobs_bound: float | None = None
    clusters: int | None = None
    clusters_after: float | None = None
    clusters_bound: float | None = None
    note: str = ""
    complaints: list[str] = field(default_factory=list)
    not_run: str = ""
    met: bool = False
    seconds: float = 0.0

    def gone(self, arena: Arena, since: float, jobs_within: float, clusters_within: float) -> None:
        """Wait until queue and gateway are empty, for longer than the bounds, and note when they were.

        The bounds are those of an idle machine: they grow with the load of this one.

        Args:
            arena: where to look.
            since: the moment that counts as the end, Unix time in seconds.
            jobs_within: the bound for jobs, in seconds.
            clusters_within: that for gateway clusters.
        """
        deadline = time.time() + PATIENCE * (max(jobs_within, clusters_within) + 30)
        while True:
            try:
                if self.jobs != 0:
                    self.jobs = len(arena.job_ids())
                    self.jobs_after = max(0.0, time.time() - since)
                if self.clusters != 0:
                    self.clusters = len(arena.clusters())
                    self.clusters_after = max(0.0, time.time() - since)
            except Unknown:
                pass
            if self.jobs == self.clusters == 0 or time.time() > deadline:
                break
            time.sleep(0.2)
        busy = slowness()
        jobs_within, clusters_within = busy * jobs_within, busy * clusters_within
        self.jobs_bound, self.clusters_bound = jobs_within, clusters_within
        self.expect(self.jobs == 0, f"{self.jobs} jobs are left")
        self.expect(self.clusters == 0, f"{self.clusters} gateway clusters are left")
        self.expect((self.jobs_after or 0) <= jobs_within, f"jobs were gone after {self.jobs_after:.1f} s only")
        self.expect(
            (self.clusters_after or 0) <= clusters_within,
            f"gateway clusters were gone after {self.clusters_after:.1f} s only",
        )

    def judge(
        self, arena: Arena, flows: Sequence[FlowProcess], states: Sequence[str], again: int, sweep: bool = False
    ) -> None:
        """Ask the API how the flow runs and their task runs ended, and count what ran again.

        Args:
            arena: whose server.
            flows: the flow runs.
            states: the final states that are right.
            again: most executions beyond the first.
            sweep: whether the sweep runs before.
        """
        self.swept = sweep
        deadline = time.time() + SETTLE
        with arena.api() as api:
            if sweep:
                deadline = time.time() + SWEEP_WITHIN
                arena.sweep()
                while self._unfinished(api, flows) and time.time() < deadline:
                    time.sleep(5)
                    arena.sweep()
            while True:
                ended = [_state(api, flow) for flow in flows]
                unfinished = self._unfinished(api, flows)
                if (not unfinished and all(one in states for one in ended)) or time.time() > deadline:
                    break
                time.sleep(0.5)
            lost = {name for flow in flows for name in _lost(api, flow)}
        self.flow = ", ".join(dict.fromkeys(ended))
        self.not_terminal, self.lost = len(unfinished), len(lost)
        self.again = sum(max(0, len(flow.runs_of(task)) - 1) for flow in flows for task in _tasks(flow))
        self.expect(all(one in states for one in ended), f"flow runs are {ended}, not {' or '.join(states)}")
        self.expect(not unfinished, f"task runs that did not end: {unfinished}")
        self.expect(not lost, f"results lost: {sorted(lost)}")
        self.expect(self.again <= again, f"{self.again} executions too many, not {again} at most")
        left = [*arena.job_ids(), *arena.clusters()]
        self.expect(not left, f"came back: {left}")

    def expect(self, right: bool, complaint: str) -> None:
        """Complain unless something is right; the rest of the row is measured all the same."""
        if not right:
            self.complaints.append(complaint)

    def check(self) -> None:
        """Fail where there was a complaint."""
        assert self.complaints == []

    def write(self) -> None:
        """Append the record to the results, where somebody wants them."""
        path = os.environ.get(RESULTS_VARIABLE)
        if path:
            with Path(path).open("a") as stream:
                stream.write(json.dumps(asdict(self)) + "\n")

    @staticmethod
    def _unfinished(api: httpx.Client, flows: Sequence[FlowProcess]) -> list[str]:
        kinds = {kind.value for kind in UNFINISHED}
        return [
            f"{one['name']} {one['state_name']}"
            for flow in flows
            for one in _task_runs(api, flow)
            if one["state_type"] in kinds or one["state_type"] is None
        ]


def _state(api: httpx.Client, flow: FlowProcess) -> str:
    return str(api.get(f"/flow_runs/{flow.flow_run_id}").raise_for_status().json()["state_name"])


def flow_message(arena: Arena, flow: FlowProcess) -> str:
    """What the flow run's state says."""
    with arena.api() as api:
        found: dict[str, Any] = api.get(f"/flow_runs/{flow.flow_run_id}").raise_for_status().json()
    return str(found["state"]["message"])


def task_run_messages(arena: Arena, flow: FlowProcess) -> dict[str, str]:
    """Type and message of each task run's state, by its name."""
    with arena.api() as api:
        return {
            str(one["name"]): f"{one['state_type']}: {(one['state'] or {}).get('message')}"
            for one in _task_runs(api, flow)
        }


def _task_runs(api: httpx.Client, flow: FlowProcess) -> list[dict[str, Any]]:
    wanted = {"flow_runs": {"id": {"any_": [flow.flow_run_id]}}, "limit": 200}
    found: list[dict[str, Any]] = api.post("/task_runs/filter", json=wanted).raise_for_status().json()
    return found


def _tasks(flow: FlowProcess) -> list[str]:
    return [*flow.order["quick"], *(name for name, _ in flow.order["late"]), "joined"]


def _lost(api: httpx.Client, flow: FlowProcess) -> list[str]:
    """Collected results that the flow missed, that were computed again, or that the API has as other than Completed.

    An attempt of the flow's that failed has its tasks run again by the next one: that is a retry, and no loss.
    """
    missed = list(flow.said("lost").get("names", []))
    collected = flow.said("collected").get("names", [])
    attempts = int(flow.said("began").get("attempt", 1))
    missed += [name for name in collected if len(flow.runs_of(name)) > attempts]
    runs = [one for one in _task_runs(api, flow) if one["task_key"].startswith("quick")]
    completed = sum(1 for one in runs if one["state_type"] == "COMPLETED")
    missed += [f"{len(collected) - completed} in the API"] if completed < len(collected) else []
    return missed
