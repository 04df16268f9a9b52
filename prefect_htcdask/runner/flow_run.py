"""Live handles (cluster, client, futures) of flow runs, kept outside the runner.

Prefect pickles a runner, duplicates it, enters the duplicate and calls `cancel_all` on the original; the handles must
be found from each of them and travel with none. They are found by the flow run's id.
"""

from __future__ import annotations

import atexit
import contextvars
import logging
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias
from uuid import UUID
from weakref import WeakValueDictionary

from prefect.client.schemas.objects import State, StateType

from prefect_htcdask.errors import HTCDaskError
from prefect_htcdask.runner.client.client import ReconnectingClient, ReconnectPolicy
from prefect_htcdask.runner.client.connection import FlowConnection
from prefect_htcdask.runner.end import Stage, run_stages
from prefect_htcdask.runner.futures.crash_reasons import JobOutcomes
from prefect_htcdask.runner.futures.gatherer import Gatherer
from prefect_htcdask.runner.futures.pending_result import PendingResult
from prefect_htcdask.runner.preflight import check_versions
from prefect_htcdask.runner.states.cancelling import TIMEOUT as CANCELLING_TIMEOUT
from prefect_htcdask.runner.states.cancelling import end_cancelling
from prefect_htcdask.runner.states.ended_task_runs import EndedTaskRuns
from prefect_htcdask.runner.states.reconcile import InterruptedTaskRuns, StateReconciler, first_attempt
from prefect_htcdask.runner.states.reporter import AT_MOST, Ended, Started, StateReporter
from prefect_htcdask.runner.states.result_recovery import ResultRecovery
from prefect_htcdask.runner.states.unawaited import cancel_or_wait, executing
from prefect_htcdask.runner.submit.submitter import Submitter
from prefect_htcdask.runner.ui.artifacts import PATIENCE as ARTIFACTS_PATIENCE
from prefect_htcdask.runner.ui.artifacts import start_artifacts
from prefect_htcdask.runner.ui.decisions import scaling_line, summary_line
from prefect_htcdask.runner.ui.events import FLUSH_TIMEOUT, FlowEvents
from prefect_htcdask.scheduler.worker_groups import OFFERS_METADATA, Offers
from prefect_htcdask.supervisor.protocol import CLOSE_TIMEOUT, GATEWAY_TIMEOUT
from prefect_htcdask.utils.aio import interpreter_ends
from prefect_htcdask.worker.cancellation import interrupt

WATCH_INTERVAL = 1.0
ANSWER = 5.0
"""Seconds for workers to say what they run, as an interrupted flow ends."""

FAILURE_GRACE = 10.0
"""Seconds for the supervisor process to say why its cluster does not answer, before a lost connection is the reason."""

# In quotes, since Python 3.10 cannot subscript LoggerAdapter.
Logger: TypeAlias = "logging.Logger | logging.LoggerAdapter[Any]"


@dataclass
class FlowRunSession:
    """What one flow run holds while it runs.

    Args:
        key: the flow run's id, or another name outside a flow.
        client: the Dask client; this run's own.
        cluster: the cluster, where this run made it and will close it.
        stack: leaves what was entered after the client (a performance report).
        owner: identity of the runner that was entered.
        api_url: the Prefect API as workers reach it.
        logger: the flow run's logger.
    """

    key: str
    client: ReconnectingClient
    cluster: Any | None
    owner: str
    api_url: str | None
    logger: Logger
    flow_run_id: UUID | None
    stack: ExitStack = field(default_factory=ExitStack)
    thread: int = field(default_factory=threading.get_ident)

    def __post_init__(self) -> None:
        self.reporter = StateReporter(self.flow_run_id)
        self.ended_task_runs = EndedTaskRuns()
        self.reconciler = StateReconciler(self.reporter, self.ended_task_runs, self.log, self.cluster is not None)
        self.job_outcomes = JobOutcomes()
        connection = FlowConnection(self.client)
        self.gatherer = Gatherer(connection, self._report_lost, self.job_outcomes, self.ended_task_runs.ended)
        self.submitter = Submitter(connection, self.key, self.api_url)
        self._lock = threading.Lock()
        self._unfinished: dict[UUID, PendingResult] = {}
        self._by_key: WeakValueDictionary[str, PendingResult] = WeakValueDictionary()
        self._cancelled = False
        self._cancelling = False
        self._interrupted: set[UUID] = set()
        self._started: dict[UUID, Started] = {}
        self._closed = False
        self._stop = threading.Event()
        self._context = contextvars.copy_context()
        self.recovery = ResultRecovery(
            self.client, self.key, self._final_state, self.job_outcomes, self.log, self.ended_task_runs
        )
        self.events = FlowEvents(str(getattr(self.cluster, "name", None) or self.key), self._context)
        if self.cluster is not None:
            self.events.created(self.client.dashboard_link or "", list(getattr(self.cluster, "worker_offers", ())))
        self.artifacts = start_artifacts(self.cluster, self.client.dashboard_link, self._context, self.log)
        self.client.resume_on(self._policy())
        self._watcher = threading.Thread(target=self._watch, name="htcdask-watch", daemon=True)
        self._watcher.start()

    @property
    def offers(self) -> Offers | None:
        """What the worker groups of the cluster offer; `None` where nobody can say."""
        return self.submitter.offers

    def set_worker_resources(self, offers: Offers | None) -> None:
        """Take what the worker groups offer; unless it is known, ask the scheduler of the pool for it."""
        if offers is None:
            offers = self.client.get_metadata(list(OFFERS_METADATA), default=None)
        self.submitter.offers = offers

    def track(self, results: list[PendingResult]) -> None:
        """Hold task runs until they end, so that a submitted task runs though nobody keeps its future."""
        with self._lock:
            self._unfinished.update((result.task_run_id, result) for result in results)
            self._by_key.update((result.key, result) for result in results)
        self.gatherer.read_ahead.follow(results)

    def check(self) -> None:
        """Raise what keeps this run from having any work done.

        Raises:
            HTCDaskError: the cluster failed, the run was cancelled or is over.
        """
        if self.gatherer.failure is not None:
            raise self.gatherer.failure
        if self._closed or self._cancelled:
            raise HTCDaskError("the flow run's Dask cluster is closed; nothing can be submitted any more")

    def fail(self, error: HTCDaskError) -> None:
        """Make every outstanding and every later future of this run raise `error`, so that the flow does not hang."""
        if self.gatherer.failure is None:
            self.log("error", str(error))
        self.gatherer.fail(error)

    def _policy(self) -> ReconnectPolicy:
        """How a lost connection is renewed: for as long as a cluster of this run's lives without its supervisor."""
        return ReconnectPolicy(
            patience=self.client.timeout if self.cluster is None else self.cluster.settings.lease.scheduler_duration,
            failure_grace=0.0 if self.cluster is None else FAILURE_GRACE,
            goes_on=lambda: not self._closed and self.gatherer.failure is None,
            final_state_of=self._final_state,
            results_in_hand=lambda: sum(one.packed is not None for one in list(self._by_key.values())),
            log=self.log,
            fail=self.fail,
        )

    def cancel(self) -> None:
        """Cancel every task run that has not ended, interrupt those that run, and tell Prefect of them."""
        results = self.unfinished()
        with self._lock:
            self._cancelled = self.gatherer.cancelled = True
            self._interrupted.update(result.task_run_id for result in results)
        if results:
            with suppress(Exception):
                self.client.cancel([result.dask_future for result in results], reason="the flow run was cancelled")
            # The flow's own code may go on for a long time yet.
            thread = threading.Thread(target=self._stop_cancelled, args=(results,), name="htcdask-cancel", daemon=True)
            thread.start()

    def _stop_cancelled(self, results: list[PendingResult]) -> None:
        self._mark_running(results)
        with suppress(Exception):
            self.client.run(interrupt, self.key, on_error="ignore")
        self.reconciler.tell_interrupted(self._interrupted_task_runs("The flow run was cancelled while this task ran"))

    def unfinished(self) -> list[PendingResult]:
        """The task runs that have not ended."""
        with self._lock:
            held = list(self._unfinished.values())
            pending: list[PendingResult] = []
            ended: list[PendingResult] = []
            for result in held:
                (pending if result.is_pending() else ended).append(result)
            for result in ended:
                del self._unfinished[result.task_run_id]
                # Dask lets go of their inputs as well.
                result.upstreams = ()
        self.ended_task_runs.ended(ended)
        known = ("finished", "cancelled") if self._cancelled else ("finished",)
        for result in ended:
            if result.packed is None and result.dask_future.status not in known:
                # Nobody may be waiting for it, but the Prefect API still has to hear what became of it.
                self.gatherer.request(result)
        return pending

    def on_message(self, message: dict[str, Any]) -> None:
        """Take what the cluster's supervisor process says; see `HTCGatewayCluster`."""
        kind = message.get("kind")
        if kind in ("log", "waiting"):
            self.log(str(message.get("level", "info")), str(message.get("text", "")))
        elif kind == "failed":
            self.fail(HTCDaskError(str(message.get("text", "the workers cannot be had"))))
        elif kind == "job":
            self.job_outcomes.take(message)
            self.events.job(message)
        elif kind == "decision":
            if line := scaling_line(message):
                self.log("info", line)
                self.events.scaled(message)
        elif kind == "progress" and self.artifacts:
            self.artifacts.take(message)
        elif kind == "flow_run_ended" and str(message.get("state", "")).startswith("CANCELL"):
            # Cancelled through the API, where no Prefect process stands beside this one to be told.
            self.log("warning", "The flow run was cancelled: its task runs are cancelled and its workers removed")
            self._cancelling = True
            self.cancel()

    def log(self, level: str, text: str) -> None:
        """Log to the flow run, from whatever thread."""
        number = logging.getLevelName(level.upper())
        if not isinstance(number, int):
            number = logging.INFO
        # Prefect sends no more logs as the interpreter ends; the console has them.
        chosen = logging.getLogger("prefect.task_runner.htcdask") if interpreter_ends() else self.logger
        self._context.copy().run(chosen.log, number, text)

    def close(self, error: BaseException | None = None) -> None:
        """End the run: what has not started is cancelled, what runs may finish, then client and cluster close.

        Prefect's own thread pool runner does the same. Where the flow itself was interrupted, nothing is waited for.

        Args:
            error: the exception with which the flow left the runner; none for a flow that returned or failed.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._stop.set()
        pending = self.unfinished()
        interrupted = error is not None or self._cancelled or self.gatherer.failure is not None
        # Nobody comes back for what runs on while the connection is away.
        interrupted = interrupted or self.client.status != "running"
        try:
            if pending and not interrupted:
                self.client.flush_submits()
                cancel_or_wait(
                    self.client, pending, lambda: self.gatherer.failure is None, self.gatherer.set_state, self.log
                )
        except BaseException as exc:
            error = error or exc
            raise
        finally:
            self._end(pending, error)

    def _end(self, pending: list[PendingResult], error: BaseException | None) -> None:
        """Close everything."""
        self.unfinished()
        left = [result for result in pending if result.packed is None and result.dask_future.status != "finished"]
        run_stages(self._stages(left, error), self.log)

    def _stages(self, left: list[PendingResult], error: BaseException | None) -> list[Stage]:
        """What is done at the end, in its order; ``docs/end-of-a-flow.md`` shows it with its limits added up.

        Args:
            left: task runs that have not ended.
            error: the exception with which the flow left the runner, if it did.
        """
        interrupted = error is not None or self._cancelled
        settling = first_attempt(interrupted) + AT_MOST
        report = "The Dask performance report could not be written"
        stages = [
            Stage("asking which task runs have started", lambda: self._mark_running(left), ANSWER if left else 0.0),
            Stage("cancelling what is left", lambda: self._cancel_left(left)),
            Stage("forgetting what the scheduler keeps", lambda: self.submitter.close(forget=self.cluster is None)),
            Stage("writing the performance report", self.stack.close, complaint=report),
            Stage("the last callbacks", self.gatherer.close),
            Stage("answering workers", self.recovery.close),
            Stage("closing the Dask client", self.client.close, complaint="The Dask client did not close cleanly"),
        ]
        if self.cluster is not None:
            stages += [
                Stage("closing the cluster", self.cluster.close, CLOSE_TIMEOUT + GATEWAY_TIMEOUT, is_fatal=True),
                Stage("the summary", self._summarise),
                Stage("sending events", self.events.flush, FLUSH_TIMEOUT),
            ]
        stages.append(Stage("settling task runs with Prefect", lambda: self._settle(left, error), settling))
        if self._cancelling and (flow_run_id := self.flow_run_id) is not None:
            ending = partial(self._context.copy().run, end_cancelling, flow_run_id)
            stages.append(Stage("ending the cancelled flow run", ending, CANCELLING_TIMEOUT))
        if self.artifacts:
            stages.append(Stage("the last artifacts", self.artifacts.close, ARTIFACTS_PATIENCE))
        return stages

    def _cancel_left(self, left: list[PendingResult]) -> None:
        if left:
            self.client.cancel([result.dask_future for result in left], reason="the flow run has ended")

    def _settle(self, left: list[PendingResult], error: BaseException | None) -> None:
        ended = f"{type(error).__name__}: {error}".rstrip(": ") if error is not None else "its cluster was closed"
        with self._lock:
            self._interrupted.update(result.task_run_id for result in left)
        interrupted = error is not None or self._cancelled
        self.reconciler.reconcile(
            self._interrupted_task_runs(f"The flow run ended while this task ran ({ended})", interrupted)
        )

    def _summarise(self) -> None:
        assert self.cluster is not None
        summary = self.cluster.summary
        if summary:
            self.log("info", summary_line(summary))
        if self.artifacts:
            self.artifacts.finish(summary)
        self.events.closed(summary)

    def _interrupted_task_runs(self, why: str, interrupted: bool = False) -> InterruptedTaskRuns:
        kind = StateType.CANCELLED if self._cancelled else StateType.CRASHED
        with self._lock:
            return InterruptedTaskRuns(
                frozenset(self._interrupted), kind, why, interrupted, tuple(self._started.values())
            )

    def _mark_running(self, results: list[PendingResult]) -> None:
        """Note which of these task runs have started: the Prefect API may not have heard of them yet."""
        keys: frozenset[str] = frozenset()
        if results and self.client.status == "running":
            # Who interrupts a flow does not wait for a worker that does not answer.
            with suppress(Exception):
                keys = executing(self.client, ANSWER)
        started = [result for result in results if result.key in keys]
        with self._lock:
            self._started.update(
                (result.task_run_id, Started(result.task_run_id, result.task_name, result.task)) for result in started
            )

    def _final_state(self, key: str) -> State[Any] | None:
        """The state in which a task run ended, by its Dask key, where it was collected."""
        with self._lock:
            result = self._by_key.get(key)
        packed = result.packed if result is not None else None
        return packed.state if packed is not None and packed.type in (StateType.COMPLETED, StateType.FAILED) else None

    def _report_lost(self, result: PendingResult, state: State[Any]) -> None:
        # When the whole cluster fails, task runs that never started need no record of their own.
        # Nor do those that were cancelled before they started.
        task = result.task if self.gatherer.failure is None and not state.is_cancelled() else None
        # Of what has finished, its worker has told otherwise.
        overrules = result.dask_future.status == "finished"
        self.reporter.report(Ended(result.task_run_id, result.task_name, task, state, overrules))

    def _watch(self) -> None:
        """Notice what nobody waits for: lost task runs, a lost scheduler, versions that do not match."""
        # A cluster of our own compares versions as its workers start.
        compared = self.cluster is not None
        while not self._stop.wait(WATCH_INTERVAL):
            try:
                self.events.tick()
                self.unfinished()
                if not compared and self.client.status == "running" and self._has_workers():
                    compared = True
                    check_versions(self.client)
            except HTCDaskError as exc:
                self.fail(exc)
            except Exception as exc:
                if self._stop.is_set():
                    return
                self.logger.debug("The watch over the Dask client failed: %s", exc)

    def _has_workers(self) -> bool:
        return bool(self.client.scheduler_info(n_workers=1)["workers"])


class _Slot:
    """A place in the registry: its lock is held while the run is being opened."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.run: FlowRunSession | None = None


_lock = threading.RLock()
_slots: dict[str, _Slot] = {}
_pid = os.getpid()


def find(key: str) -> FlowRunSession | None:
    """The live run of a flow run, if it has one in this process."""
    with _lock:
        slot = _slots.get(key) if os.getpid() == _pid else None
    return slot.run if slot is not None else None


def find_or_open(key: str, opener: Callable[[], FlowRunSession]) -> FlowRunSession:
    """The live run of a flow run; the first to ask opens it, while others wait."""
    global _pid
    with _lock:
        if os.getpid() != _pid:
            # A forked child inherits the table, but none of the connections in it works there.
            _slots.clear()
            _pid = os.getpid()
        slot = _slots.setdefault(key, _Slot())
    with slot.lock:
        if slot.run is None:
            slot.run = opener()
        return slot.run


def close(key: str, error: BaseException | None = None) -> None:
    """Close a flow run's live handles, if it has any."""
    with _lock:
        slot = _slots.pop(key, None) if os.getpid() == _pid else None
    if slot is not None and slot.run is not None:
        slot.run.close(error)


def owned_by(owner: str, thread: int) -> list[FlowRunSession]:
    """Live runs that duplicates of one runner opened in one thread."""
    with _lock:
        runs = [slot.run for slot in _slots.values() if slot.run is not None]
    return [run for run in runs if run.owner == owner and run.thread == thread]


@atexit.register
def _close_all() -> None:
    if os.getpid() == _pid:
        for key in list(_slots):
            with suppress(Exception):
                close(key, SystemExit("the interpreter ended"))
