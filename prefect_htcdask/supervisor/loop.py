"""The supervisor's loop: look at jobs and scheduler, decide, act; and clean up when it is over.

Desired state against actual state, once per interval or when something wakes it (as in dask_gateway_server's
`db_base` backend). All decisions come from `scaling.policy`; all HTCondor calls go through `condor`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..condor.job_events import EventLogReader, JobReader, QueueReader
from ..condor.schedd import ScheddClient, ScheddError
from ..condor.staging import RunDirectory
from ..condor.worker_job import JobFiles, cluster_constraint, submit_description
from ..scaling.policy import Decision, Demand, PolicySettings, Target, decide
from .fleet import Fleet
from .job_news import JobNews, why_none_joined
from .protocol import HandOff
from .scheduler_link import GatewayLink, SchedulerLink

logger = logging.getLogger(__name__)

SUPERSEDED = "superseded"
"""Why a supervisor ends whose cluster another one took over: it leaves the jobs alone."""

_DEFAULT_GROUP = "default"
_FIRST_INTERVAL = 0.2
_MAX_BACKOFF = 60.0
_PATIENCE = 2.0  # seconds without an answer of the scheduler before the gateway is asked
_MAX_RENEWAL_INTERVAL = 600.0


class Supervisor:
    """Owns the worker jobs of one gateway cluster.

    Args:
        plan: what the flow's process handed over.
        schedd: the schedd, already checked.
        say: sends a message to the flow's process.
    """

    def __init__(self, plan: HandOff, schedd: ScheddClient, say: Callable[[dict[str, Any]], None]) -> None:
        self.plan = plan
        self.schedd = schedd
        self.say = say
        self.directory = RunDirectory(Path(plan.run_directory))
        self.constraint = cluster_constraint(plan.access.cluster_name)
        self.fleet = Fleet()
        self.news = JobNews(self.fleet, self.directory, say)
        self.target = (
            Target(minimum=plan.minimum, maximum=plan.maximum) if plan.adaptive else Target(fixed=plan.fixed or 0)
        )
        self.scheduler = SchedulerLink(plan.access, plan.owner)
        self.gateway = GatewayLink(plan.access)
        self.wake = asyncio.Event()
        self.over = asyncio.Event()
        self.ended_because = ""
        self.stop_cluster = True
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="condor")
        self._reader: JobReader | None = None
        self._files: dict[str, JobFiles] = {}
        self._renew_at = 0.0
        self._waiting_since: float | None = None
        self._request_seen = plan.request_seen
        self._no_submit_before = 0.0
        self._backoff = 1.0
        self._failed = False
        self._told: set[str] = set()
        self._background: set[asyncio.Task[Any]] = set()

    def hurry(self) -> None:
        """Have the next `read_jobs` look at the queue, however short ago it did."""
        if self._reader is not None:
            self._reader.hurry()

    async def condor(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call the bindings in their own thread: they are not thread-safe among themselves."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    # Start

    async def start(self, takeover: bool) -> None:
        """Stage the files, claim the cluster, find jobs that a predecessor left.

        Args:
            takeover: whether an earlier supervisor of the same owner was lost.

        Raises:
            RuntimeError: another supervisor owns the cluster.
        """
        # The claim comes first: an owner that lives has its files in the same place.
        answer = await self.scheduler.claim(force=False)
        if not answer["granted"]:
            raise RuntimeError(
                f"cluster {self.plan.access.cluster_name} is looked after by another supervisor ({answer['owner']})"
            )
        self.directory.prepare()
        for group in self.plan.groups:
            self._files[group] = self.directory.stage(
                group,
                self.plan.config_of(group),
                tls_cert=self.plan.access.tls_cert,
                tls_key=self.plan.access.tls_key,
                secrets=self.plan.worker_secrets,
                log_is_local=self.schedd.address.is_local,
            )
        queue = QueueReader(self.schedd, self.constraint)
        self._reader = EventLogReader(self.directory.event_log) if self.schedd.address.is_local else queue
        if takeover or answer["epoch"] > 1:
            # Jobs that a predecessor submitted, of which the log may not tell: it may have been on another host.
            await self.read_jobs()
            await self.condor(queue.read, self.fleet.table)

    # The loop

    async def run(self) -> None:
        """Look, decide and act until it is over."""
        over = asyncio.ensure_future(self.over.wait())
        while not self.over.is_set():
            # The first tasks are about to come, and nothing else is going on: they are not kept waiting.
            interval = self.plan.interval if self.fleet.table.records else min(_FIRST_INTERVAL, self.plan.interval)
            round_ends = time.monotonic() + interval
            # A round may wait for a scheduler that does not answer; the end does not wait for the round.
            tick = asyncio.ensure_future(self.tick())
            await asyncio.wait([tick, over], return_when=asyncio.FIRST_COMPLETED)
            if not tick.done():
                tick.cancel()
            try:
                await tick
            except asyncio.CancelledError:
                continue
            except ScheddError as exc:
                self.tell_once("warning", f"{exc}; trying again")
            except Exception:
                logger.exception("a round failed; the next one goes on")
            woken = asyncio.ensure_future(self.wake.wait())
            pause = max(0.05, round_ends - time.monotonic())
            await asyncio.wait([woken, over], timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            woken.cancel()
            self.wake.clear()

    async def tick(self) -> None:
        """One round."""
        try:
            await self.read_jobs()
        except ScheddError as exc:
            # The scheduler's lease is renewed by the question for demand, schedd or no schedd.
            self.tell_once("warning", f"{exc}; trying again")
        demand = await self.take_answer(answer := await self.ask_scheduler())
        if self.over.is_set():
            return
        now = time.monotonic()
        decision = decide(demand, self.fleet.supply(answer if demand else None, now), self.policy(), now)
        if demand is not None and decision.target == 0:
            self._waiting_since = None  # nobody waits for a worker any more
        await self.act(decision)
        await self.renew()
        await self.check_start(demand)

    async def ask_scheduler(self) -> dict[str, Any] | None:
        """The scheduler's answer; none at once where the gateway says that its cluster is over."""
        asking = asyncio.ensure_future(self.scheduler.demand())
        await asyncio.wait([asking], timeout=_PATIENCE)
        if not asking.done() and await self.gateway.is_over():
            asking.cancel()  # it would try to connect for a while yet
            return None
        return await asking

    def policy(self) -> PolicySettings:
        """The policy's settings as they are now."""
        spec = self.plan.groups[_DEFAULT_GROUP]
        return PolicySettings(
            target=self.target,
            threads=spec.threads,
            residence=self.plan.residence,
            max_idle_jobs=self.plan.max_idle_jobs,
            max_failures=self.plan.max_failures,
        )

    async def take_answer(self, answer: dict[str, Any] | None) -> Demand | None:
        """Take in what the scheduler said; returns the demand, or `None` where it is unknown."""
        if answer is None:
            if await self.gateway.is_over():
                self.fail(f"gateway cluster {self.plan.access.cluster_name} is gone: its scheduler was stopped or lost")
                self.end("the gateway cluster is gone")
            return None
        if answer["status"] == "superseded":
            # Another supervisor owns the workers now: leave them alone.
            self.say(
                {
                    "kind": "log",
                    "level": "warning",
                    "text": f"another supervisor ({answer['owner']}) took over the workers of this cluster",
                }
            )
            self.stop_cluster = False
            self.fleet.leaving.clear()
            self.end(SUPERSEDED)
            return None
        for job_id in self.fleet.saw_workers(answer["joined"]):
            self.say({"kind": "job", "what": "joined", "job": job_id, "host": self.fleet.table.get(job_id).host})
        request = answer.get("request")
        if request and request["number"] > self._request_seen:
            self._request_seen = request["number"]
            self.set_target(request)
            self.say({**request, "kind": "target", "fixed": self.target.fixed})
        return Demand(queued=answer["queued"], in_hand=answer["in_hand"])

    def set_target(self, request: dict[str, Any]) -> None:
        """Take a wish to scale or adapt.

        Raises:
            ValueError: the numbers make no sense.
        """
        if request["op"] == "scale":
            self.target = Target(fixed=int(request["n"]))
        elif request["op"] == "hold":
            self.target = Target(fixed=self.fleet.supply(None).total)
        else:
            self.target = Target(minimum=int(request["minimum"]), maximum=int(request["maximum"]))
        self.wake.set()

    async def act(self, decision: Decision) -> None:
        """Carry a decision out."""
        if decision.gives_up:
            self.give_up(decision.gives_up)
        if decision.submit and (self._failed or time.monotonic() < self._no_submit_before):
            return
        if decision.changes:
            self.say({"kind": "decision", "text": decision.reason, "target": decision.target})
        if decision.submit:
            await self.submit(decision.submit)
        if decision.remove_pending:
            self.fleet.leaving.update(decision.remove_pending)
            await self.condor(self.schedd.remove, decision.remove_pending, "prefect_htcdask: fewer workers are needed")
        if decision.retire:
            jobs = {name: job for job, name in self.fleet.joined.items() if name in set(decision.retire)}
            self.fleet.leaving.update(jobs.values())
            self._spawn(self.retire(jobs, idle_only=self.target.fixed is None))

    async def submit(self, count: int) -> None:
        """Submit workers in one transaction, if the schedd takes them."""
        spec, files = self.plan.groups[_DEFAULT_GROUP], self._files[_DEFAULT_GROUP]
        commands = submit_description(
            spec,
            files,
            cluster_name=self.plan.access.cluster_name,
            group=_DEFAULT_GROUP,
            flow_run=self.plan.flow_run,
            lease_expires=int(time.time() + self.plan.lease),
            lost_schedd_lease=self.plan.lost_schedd,
        )
        try:
            job_ids = await self.condor(self.schedd.submit, commands, count)
        except ScheddError as exc:
            self._no_submit_before = time.monotonic() + self._backoff
            self.tell_once("error", f"{exc}; the next attempt is in {self._backoff:.0f} s")
            self._backoff = min(self._backoff * 2, _MAX_BACKOFF)
            self._waiting_since = self._waiting_since or time.monotonic()
            return
        self._backoff = 1.0
        self._waiting_since = self._waiting_since or time.monotonic()
        self.fleet.submitted_jobs(job_ids, _DEFAULT_GROUP, time.time())
        logger.info("submitted %d jobs: %s to %s", count, job_ids[0], job_ids[-1])

    async def retire(self, jobs: dict[str, str], idle_only: bool) -> None:
        """Retire workers, given with their jobs; those that cannot go now stay in the fleet."""
        retired = await self.scheduler.retire(sorted(jobs), idle_only)
        self.fleet.leaving.difference_update(job for name, job in jobs.items() if name not in retired)
        # A worker process that hangs in its end would keep the slot.
        await asyncio.sleep(2 * self.plan.groups[_DEFAULT_GROUP].vacate_time)
        queued = {record.job_id for record in self.fleet.queued_jobs()}
        stuck = [jobs[name] for name in retired if jobs[name] in queued & self.fleet.leaving]
        await self.condor(self.schedd.remove, stuck, "prefect_htcdask: the worker was retired but did not end")

    async def renew(self) -> None:
        """Renew the lease of all jobs, at a third of it."""
        now = time.monotonic()
        if now < self._renew_at:
            return
        self.directory.touch()
        if self.fleet.queued_jobs():
            await self.condor(self.schedd.renew, self.constraint, self.plan.lease)
        self._renew_at = now + min(self.plan.lease / 3, _MAX_RENEWAL_INTERVAL)

    async def read_jobs(self) -> None:
        """Take in what happened to the jobs, and have held ones make room for others."""
        assert self._reader is not None
        held = self.news.take(await self.condor(self._reader.read, self.fleet.table))
        if held:
            # They would stay in the queue for ever; fresh ones may land on better hosts.
            self.fleet.leaving.update(held)
            await self.condor(self.schedd.remove, held, "prefect_htcdask: held workers are replaced")

    # When workers cannot be had

    def give_up(self, why: str) -> None:
        """The failure budget is spent: say so, with what became of the last."""
        if (record := self.news.last_failed) is not None:
            where = f" on {record.host}" if record.host else ""
            why += f". The last, HTCondor job {record.job_id}{where}: {self.news.why_it_ended(record)}"
        self.fail(why)

    async def check_start(self, demand: Demand | None) -> None:
        """Give up where no worker came within the start timeout."""
        waiting = self._waiting_since
        if self._failed or waiting is None or self.fleet.ever_joined or not self.plan.start_timeout:
            return
        if time.monotonic() - waiting < self.plan.start_timeout:
            return
        try:
            slots = await self.condor(self.schedd.slots)
            why = why_none_joined(self.fleet, self.plan.groups[_DEFAULT_GROUP], slots)
        except ScheddError as exc:
            why = str(exc)
        self.fail(f"no worker started within worker.start_timeout = {self.plan.start_timeout:.0f} s: {why}")

    # Words

    def tell_once(self, level: str, text: str, key: str | None = None) -> None:
        """Say something to the flow run's log, once for each different text."""
        if (key or text) not in self._told:
            self._told.add(key or text)
            self.say({"kind": "log", "level": level, "text": text})

    def fail(self, text: str) -> None:
        """Say that workers cannot be had: the flow must fail rather than wait for ever."""
        if not self._failed:
            self._failed = True
            self.say({"kind": "failed", "text": text})

    def end(self, why: str) -> None:
        """Leave the loop; the cleanup follows."""
        if not self.over.is_set():
            self.ended_because = why
            logger.info("it is over: %s", why)
            self.over.set()

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
