"""The supervisor's loop: look at jobs and scheduler, decide, act; and clean up when it is over.

Desired state against actual state, once per interval or when something wakes it (as in dask_gateway_server's
`db_base` backend). All decisions come from `policy`; all HTCondor calls go through `condor`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect_htcdask.condor.analyze import IdleJobs
from prefect_htcdask.condor.job_codes import HoldCode, JobState
from prefect_htcdask.condor.job_events import DoubtingReader, EventLogReader, JobReader, QueueReader
from prefect_htcdask.condor.schedd import ScheddClient
from prefect_htcdask.condor.staging import RunDirectory
from prefect_htcdask.condor.submit_description import cluster_constraint, cluster_digest
from prefect_htcdask.supervisor.actions import Actions
from prefect_htcdask.supervisor.cluster_jobs import ClusterJobs
from prefect_htcdask.supervisor.disk_watch import DiskWatch
from prefect_htcdask.supervisor.job_log import JobEventHandler, unmatched
from prefect_htcdask.supervisor.notifier import Notifier
from prefect_htcdask.supervisor.pending_jobs import PendingJobsDiagnoser
from prefect_htcdask.supervisor.policy import Decision, Target, decide
from prefect_htcdask.supervisor.protocol import SupervisorConfig, group_of, target_of
from prefect_htcdask.supervisor.report.progress import Progress
from prefect_htcdask.supervisor.rpc import GatewayLink, SchedulerLink
from prefect_htcdask.supervisor.shutdown import Shutdown
from prefect_htcdask.supervisor.worker_group import WorkerGroup, idle_job_caps
from prefect_htcdask.supervisor.worker_table import WorkerTable

logger = logging.getLogger(__name__)

SUPERSEDED = "superseded"
"""Why a supervisor ends whose cluster another one took over: it leaves the jobs alone."""

_FIRST_INTERVAL = 0.2
_FIRST_TIME = 60.0  # seconds for which the first tasks are looked for as often
_PATIENCE = 2.0  # seconds without an answer of the scheduler before the gateway is asked
_MAX_RENEWAL_INTERVAL = 600.0
_LAST_ANSWER = 1.0  # seconds for the scheduler to say how it ended
_FEW = 3  # questions: one may fail as a host awakes


class Supervisor:
    """Owns the worker jobs of one gateway cluster.

    Args:
        plan: what the flow's process handed over.
        schedd: the schedd, already checked.
        say: sends a message to the flow's process.
    """

    def __init__(self, plan: SupervisorConfig, schedd: ScheddClient, say: Callable[[dict[str, Any]], None]) -> None:
        self.plan = plan
        self.schedd = schedd
        self.say = say
        self.directory = RunDirectory(Path(plan.run_directory))
        digest = cluster_digest(plan.access.cluster_name)
        self.jobs = ClusterJobs(schedd, cluster_constraint(digest))
        self.worker_table = WorkerTable(tuple(plan.groups))
        self.groups = {
            name: WorkerGroup(name, group, "workers" if len(plan.groups) == 1 else name, group.target)
            for name, group in plan.groups.items()
        }
        self.news = JobEventHandler(self.worker_table, self.groups, self.directory, say)
        self.progress = Progress(self.worker_table, self.groups, plan.report, say)
        self.notifier = Notifier(say, self.news.why_it_ended, several=len(plan.groups) > 1)
        self.waiting = PendingJobsDiagnoser(digest, self.worker_table, IdleJobs(schedd), self.condor, say)
        self.scheduler = SchedulerLink(
            plan.access, plan.owner, {name: group.spec.resources for name, group in plan.groups.items()}
        )
        self.gateway = GatewayLink(plan.access)
        self.actions = Actions(plan, schedd, self.condor, self.worker_table, self.scheduler, self.notifier)
        self.disk = DiskWatch(
            self.directory.path,
            self.condor,
            lambda quiet: self.actions.spawn(self.scheduler.quiet(quiet)),
            say,
        )
        self.wake = asyncio.Event()
        self.over = asyncio.Event()
        self.ended_because = ""
        self.stop_cluster = True
        self._reader: JobReader | None = None
        self._began = time.monotonic()
        self._renew_at = 0.0
        self._request_seen = plan.request_seen
        self._answered = time.monotonic()
        self._unanswered = 0
        self._taken_over_at: float | None = None
        self._held: set[str] = set()  # jobs to be removed, as soon as the schedd takes that

    async def condor(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call the bindings, as `ClusterJobs.call` does."""
        return await self.jobs.call(function, *args)

    # Start

    async def start(self, takeover: bool) -> None:
        """Stage the files, claim the cluster, find jobs that a predecessor left.

        Args:
            takeover: whether an earlier supervisor of the same owner was lost.

        Raises:
            RuntimeError: another supervisor owns the cluster.
        """
        # The claim comes first: an owner that lives has its files in the same place.
        answer = await self.scheduler.claim()
        if not answer["granted"]:
            raise RuntimeError(
                f"cluster {self.plan.access.cluster_name} is looked after by another supervisor ({answer['owner']})"
            )
        self.directory.prepare()
        for group in self.groups.values():
            group.files = self.directory.stage(
                group.name,
                self.plan.config_of(group.name),
                tls_cert=self.plan.access.tls_cert,
                tls_key=self.plan.access.tls_key,
                secrets=self.plan.worker_secrets,
                log_is_local=self.schedd.address.is_local,
            )
        queue = QueueReader(self.schedd, self.jobs.constraint)
        if self.schedd.address.is_local:
            loop = asyncio.get_running_loop()

            def complain(what: str) -> None:  # in the bindings' thread
                loop.call_soon_threadsafe(self.doubt, what)

            self._reader = DoubtingReader(EventLogReader(self.directory.event_log), queue, complain)
        else:
            self._reader = queue
        if takeover or answer["epoch"] > 1:
            await self.take_over(queue)

    def doubt(self, what: str) -> None:
        """Tell once that the event log cannot be relied on."""
        text = (
            f"the job event log {self.directory.event_log} {what}: from now on the schedd's queue is asked as well, "
            "once a minute. Leave the files in condor.directory alone while a flow runs, and see that its disk has room"
        )
        self.notifier.tell_once("warning", text, key="the event log cannot be relied on")

    async def take_over(self, queue: QueueReader) -> None:
        """Find the jobs that a predecessor submitted. What became of them was told by that one."""
        assert self._reader is not None
        self._taken_over_at = time.time()
        await self.condor(self._reader.read, self.worker_table.table)
        # The log may not tell of all of them, it may have been on another host; and only the ads tell the groups.
        await self.condor(queue.read, self.worker_table.table)
        for record in self.worker_table.table.in_state(JobState.RUNNING):
            self.groups[self.worker_table.group_of(record)].started(record)
        held = self.worker_table.table.in_state(JobState.HELD)
        self._held.update(record.job_id for record in held if record.hold_code != HoldCode.USER_REQUEST)

    # The loop

    async def run(self) -> None:
        """Look, decide and act until it is over."""
        over = asyncio.ensure_future(self.over.wait())
        while not self.over.is_set():
            round_ends = time.monotonic() + self.interval(time.monotonic())
            # A round may wait for a scheduler that does not answer; the end does not wait for the round.
            tick = asyncio.ensure_future(self.tick())
            await asyncio.wait([tick, over], return_when=asyncio.FIRST_COMPLETED)
            if not tick.done():
                tick.cancel()
            try:
                await tick
            except asyncio.CancelledError:
                continue
            except Exception as exc:
                self.notifier.tell_failure(exc)
            woken = asyncio.ensure_future(self.wake.wait())
            pause = max(0.05, round_ends - time.monotonic())
            await asyncio.wait([woken, over], timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            woken.cancel()
            self.wake.clear()

    def interval(self, now: float) -> float:
        """Seconds that a round takes at least."""
        if self.worker_table.table.records or now > self._began + _FIRST_TIME:
            return self.plan.interval
        # The first tasks are about to come, and nothing else is going on: they are not kept waiting.
        return min(_FIRST_INTERVAL, self.plan.interval)

    async def tick(self) -> None:
        """One round. Whatever fails in it, both leases are renewed: the workers that there are go on."""
        try:
            await self.read_jobs()
        except Exception as exc:
            # The scheduler's lease is renewed by the question for demand, schedd or no schedd.
            self.notifier.tell_failure(exc)
        try:
            await self.follow_demand()
        except Exception as exc:
            self.notifier.tell_failure(exc)
        if self.over.is_set():
            return
        await self.renew()
        await self.disk.look(time.monotonic())
        self.progress.tell(time.monotonic())
        for group in self.groups.values():
            if group.overdue(time.monotonic()):
                self.notifier.give_up_waiting(group, group.not_taken or await self.waiting.why(group))
            else:
                await self.waiting.look(group, time.time())

    async def follow_demand(self) -> None:
        """Ask the scheduler, decide for each group, and act."""
        answer = await self.ask_scheduler()
        known = await self.take_answer(answer)
        if self.over.is_set():
            return
        for group in self.groups.values():
            if suspects := group.suspects():
                await self.actions.avoid(group, suspects)
        now = time.monotonic()
        supplies = self.worker_table.supplies(answer if known else None, now)
        self.progress.saw(answer if known else None, supplies, time.time())
        demands = self.worker_table.demands(answer) if answer and known else {}
        unstarted = {name: supply.unstarted for name, supply in supplies.items()}
        for name, group in self.groups.items():
            cap = idle_job_caps(unstarted, self.plan.max_idle_jobs)[name]
            settings = group.policy(self.plan.residence, cap, self.plan.max_failures)
            decision = decide(demands.get(name), group.supply(supplies[name]), settings, now)
            if known:
                group.wanted(decision.target, now)
            try:
                unstarted[name] += await self.act(group, decision)
            except Exception as exc:  # the other groups have nothing to do with it
                self.notifier.tell_failure(exc)

    async def ask_scheduler(self) -> dict[str, Any] | None:
        """The scheduler's answer; none at once where the gateway says that its cluster is over."""
        asking = asyncio.ensure_future(self.scheduler.demand())
        await asyncio.wait([asking], timeout=_PATIENCE)
        if not asking.done() and await self.gateway.is_over():
            asking.cancel()  # it would try to connect for a while yet
            return None
        return await asking

    async def take_answer(self, answer: dict[str, Any] | None) -> bool:
        """Take in what the scheduler said; returns whether the demand is known."""
        if answer is None:
            self._unanswered += 1
            silence = time.monotonic() - self._answered
            # Without renewals the scheduler ends by itself by then (`DemandPlugin.watch`), whoever can tell of it.
            forgotten = silence > self.plan.scheduler_lease and self._unanswered >= _FEW
            if forgotten or await self.gateway.is_over():
                name = self.plan.access.cluster_name
                self.say(
                    {"kind": "failed", "text": f"gateway cluster {name} is gone: its scheduler was stopped or lost"}
                )
                self.end("the gateway cluster is gone")
            self.notifier.scheduler_silent(silence, self.plan.scheduler_lease)
            return False
        self.notifier.heard()
        self._answered, self._unanswered = time.monotonic(), 0
        if answer["status"] == "superseded":
            # Another supervisor owns the workers now: leave them alone.
            text = f"another supervisor ({answer['owner']}) took over the workers of this cluster"
            self.notifier.tell_once("warning", text)
            self.stop_cluster = False
            self.worker_table.release_all()
            self.end(SUPERSEDED)
            return False
        joined_at = time.time()
        for worker in self.worker_table.saw_workers(answer["joined"]):
            record = worker.job
            # When a predecessor's workers joined, nobody knows.
            known = self._taken_over_at is None or (record.started or 0.0) > self._taken_over_at
            self.groups[self.worker_table.group_of(record)].joined(record, joined_at if known else None)
            self.news.joined(record)
        for wish, count in answer.get("unmatched", {}).items():
            text = unmatched(wish, count, self.groups.values())
            self.notifier.tell_once("warning", text, key=f"unmatched {wish}")
        for request in answer.get("requests", ()):
            if request["number"] > self._request_seen:
                self._request_seen = request["number"]
                self.take_request(request)
        return True

    def take_request(self, request: dict[str, Any]) -> None:
        """Take another connection's wish, and tell the flow's process, for a successor of this one."""
        try:
            group = self.set_target(request)
        except ValueError as exc:
            self.say({"kind": "log", "level": "warning", "text": f"another connection's wish is not followed: {exc}"})
            return
        if request["op"] == "hold":
            request = {"op": "scale", "n": group.target.fixed, "number": request["number"]}
        self.say({**request, "kind": "target", "group": group.name})

    def set_target(self, request: Mapping[str, Any]) -> WorkerGroup:
        """Take a wish to scale or adapt; returns the group that it is for.

        Raises:
            ValueError: the numbers make no sense, there is no such group, or the cluster is over.
        """
        if self.over.is_set():
            raise ValueError(f"cluster {self.plan.access.cluster_name} is over: {self.ended_because}")
        group = self.groups[group_of(request, self.groups)]
        if request["op"] == "hold":
            supply = self.worker_table.supplies(None, time.monotonic())[group.name]
            group.wants(Target(fixed=supply.total))
        else:
            group.wants(target_of(request))
        self.wake.set()
        return group

    async def act(self, group: WorkerGroup, decision: Decision) -> int:
        """Carry a decision out; returns how many jobs were submitted."""
        return await self.actions.carry_out(group, decision)

    async def renew(self) -> None:
        """Renew the lease of all jobs, at a third of it."""
        now = time.monotonic()
        if now < self._renew_at:
            return
        self.directory.touch()
        if self.worker_table.queued_jobs():
            await self.jobs.renew(self.plan.lease)
            self.notifier.saw_clock(self.schedd.clock_ahead)
        self._renew_at = now + min(self.plan.lease / 3, _MAX_RENEWAL_INTERVAL)

    async def read_jobs(self, at_once: bool = False) -> None:
        """Take in what happened to the jobs, and have held ones make room for others.

        Args:
            at_once: look at the queue too, however short ago that was.
        """
        assert self._reader is not None
        if at_once:
            self._reader.look_at_next_read()
        changes = await self.condor(self._reader.read, self.worker_table.table)
        self._held.update(self.news.take(changes))
        if lost := self.worker_table.evicted(changes):
            self.actions.spawn(self.scheduler.pardon(lost))
        if self._held:
            # They would stay in the queue for ever; fresh ones may land on better hosts.
            self.worker_table.mark_leaving(self._held)
            await self.condor(self.schedd.remove, sorted(self._held), "prefect_htcdask: held workers are replaced")
            self._held.clear()

    async def last_look(self) -> None:
        """See the tasks that have ended since the last round, if the scheduler answers at once."""
        if self._unanswered or self.ended_because == SUPERSEDED:
            return
        with suppress(Exception):  # the cleanup comes, whatever becomes of this
            answer = await asyncio.wait_for(self.scheduler.demand(), _LAST_ANSWER)
            if answer is not None and answer["status"] == "ok":
                now = time.monotonic()
                self.progress.saw(answer, self.worker_table.supplies(answer, now), time.time())

    def shutdown(self) -> Shutdown:
        """What is to be done now that it is over."""
        return Shutdown(
            self.plan,
            self.jobs,
            self.read_jobs,
            self.worker_table,
            self.scheduler,
            self.gateway,
            self.directory,
            self.notifier,
            self.ended_because,
            owns_jobs=self.ended_because != SUPERSEDED,
            stop_cluster=self.stop_cluster,
        )

    def summary(self) -> dict[str, Any]:
        """What became of the workers, and the report where one is wanted."""
        return {**self.worker_table.summary(time.time()), **self.progress.report(self.ended_because)}

    def end(self, why: str) -> None:
        """Leave the loop; the cleanup follows."""
        if not self.over.is_set():
            self.ended_because = why
            logger.info("it is over: %s", why)
            self.over.set()
