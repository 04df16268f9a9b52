"""Carries the policy's decisions out: worker jobs are submitted, removed and retired, and bad machines avoided."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from prefect_htcdask.condor.schedd import ScheddClient, ScheddError, ScheddLimit, ScheddRefusal
from prefect_htcdask.condor.submit_description import settings_in, submit_description
from prefect_htcdask.supervisor.notifier import Notifier
from prefect_htcdask.supervisor.policy import Decision
from prefect_htcdask.supervisor.protocol import SupervisorConfig
from prefect_htcdask.supervisor.rpc import SchedulerLink
from prefect_htcdask.supervisor.worker_group import WorkerGroup
from prefect_htcdask.supervisor.worker_table import Worker, WorkerTable

logger = logging.getLogger(__name__)


class Actions:
    """What is done to the worker jobs of one gateway cluster.

    Args:
        plan: what the flow's process handed over.
        schedd: the schedd.
        condor: calls one of the schedd's functions in the thread that the bindings have.
        worker_table: the jobs and workers, which learn of what is done.
        scheduler: the Dask scheduler.
        notifier: says what was done.
    """

    def __init__(
        self,
        plan: SupervisorConfig,
        schedd: ScheddClient,
        condor: Callable[..., Awaitable[Any]],
        worker_table: WorkerTable,
        scheduler: SchedulerLink,
        notifier: Notifier,
    ) -> None:
        self._plan = plan
        self._schedd = schedd
        self._condor = condor
        self._worker_table = worker_table
        self._scheduler = scheduler
        self._notifier = notifier
        self._background: set[asyncio.Task[Any]] = set()

    async def carry_out(self, group: WorkerGroup, decision: Decision) -> int:
        """Carry a decision out; returns how many jobs were submitted."""
        if decision.gives_up:
            self._notifier.give_up(group, decision.gives_up)
        if decision.goes_on:
            self._notifier.warn_degraded(group, decision.goes_on)
        submitted = 0
        if decision.submit and not group.gave_up and time.monotonic() >= group.submit_after:
            submitted = await self.submit(group, decision.submit)
        if decision.remove_pending:
            await self._condor(
                self._schedd.remove, decision.remove_pending, "prefect_htcdask: fewer workers are needed"
            )
            self._worker_table.mark_leaving(decision.remove_pending)
        if decision.retire:
            workers = self._worker_table.mark_retiring(decision.retire)
            self.spawn(self.retire(group, workers, idle_only=group.target.fixed is None))
        self._notifier.decided(group, decision, submitted)
        return submitted

    async def submit(self, group: WorkerGroup, count: int) -> int:
        """Submit workers in one transaction, if the schedd takes them; returns how many it took."""
        assert group.files is not None
        try:
            commands = submit_description(
                group.job_spec,
                group.files,
                cluster_name=self._plan.access.cluster_name,
                group=group.name,
                flow_run=self._plan.flow_run,
                lease_expires=int(await self._condor(self._schedd.now) + self._plan.lease),
                lost_schedd_lease=self._plan.lost_schedd,
            )
            self._notifier.saw_clock(self._schedd.clock_ahead)
            job_ids = await self._condor(self._schedd.submit, commands, count)
        except ScheddRefusal as exc:
            self._refused(group, str(exc))
            return 0
        except ScheddError as exc:
            pause = group.refused(time.monotonic(), str(exc))
            level = "warning" if isinstance(exc, ScheddLimit) else "error"
            self._notifier.tell_again(level, f"{exc}; the next attempt is in {pause:.0f} s", key=f"{group.name}: {exc}")
            return 0
        group.submitted()
        self._worker_table.submitted_jobs(job_ids, group.name, time.time())
        logger.info("submitted %d jobs of group %s: %s to %s", len(job_ids), group.name, job_ids[0], job_ids[-1])
        if self._schedd.limit:
            why = f"{self._schedd.limit}: it took {len(job_ids)} of {count} worker jobs"
            group.refused(time.monotonic(), why)
            self._notifier.tell_again("warning", f"{why}; the others wait", key=f"{group.name}: {self._schedd.limit}")
        return len(job_ids)

    def _refused(self, group: WorkerGroup, why: str) -> None:
        """The schedd refuses the jobs of a group for what they say: nothing comes of waiting, but what runs goes on."""
        settings = settings_in(why, group.spec, group.settings)
        about = f"correct {' and '.join(settings)}" if settings else f"see {group.settings}.extra_submit"
        text = f"HTCondor refuses the worker jobs: {why} ({about}, or ask those who look after the pool for its rules)"
        pause = group.refused(time.monotonic(), text)
        if any(self._worker_table.group_of(record) == group.name for record in self._worker_table.queued_jobs()):
            key = f"{group.name}: {why}"
            self._notifier.tell_again("error", f"{text}; workers that there are go on, and it is tried again", key=key)
            logger.info("the next attempt is in %.0f s", pause)
        else:
            self._notifier.fail(group, text)

    async def retire(self, group: WorkerGroup, workers: Mapping[str, Worker], idle_only: bool) -> None:
        """Retire workers, given by their names; those that cannot go now stay."""
        going = set(await self._scheduler.retire(sorted(workers), idle_only))
        now = time.monotonic()
        for name, worker in workers.items():
            if name not in going:
                worker.retire_failed(now)
        while going:
            # The scheduler's answers tell who has gone; who drains may take as long as its tasks do.
            await asyncio.sleep(2 * self._plan.interval)
            gone = {name for name in going if not (workers[name].at_scheduler and workers[name].name == name)}
            # A worker process that hangs in its end would keep the slot.
            await asyncio.sleep(2 * group.spec.vacate_time)
            stuck = [workers[name] for name in gone]
            await self._condor(
                self._schedd.remove,
                [worker.job.job_id for worker in stuck if worker.is_leaving and worker.job.in_queue],
                "prefect_htcdask: the worker was retired but did not end",
            )
            going -= gone

    async def avoid(self, group: WorkerGroup, suspects: set[str]) -> None:
        """Have later jobs of a group keep off machines where its workers do not come up, if there are others."""
        try:
            machines = await self._condor(self._schedd.machines)
        except ScheddError as exc:
            logger.info("%s", exc)
            return
        avoided = group.avoid(suspects, machines)
        if avoided:
            where = ", ".join(sorted(avoided))
            self._notifier.tell_once(
                "warning", f"workers do not come up on {where}: later ones of this run go elsewhere"
            )

    def spawn(self, coroutine: Any) -> None:
        """Do something beside the rounds."""
        task = asyncio.ensure_future(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
