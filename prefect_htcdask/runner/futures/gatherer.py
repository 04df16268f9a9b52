"""Brings the final states of task runs home in bulk, once somebody asks for them.

Whatever Dask itself reports (a lost worker, a lost scheduler, a cancelled future) becomes a Crashed state with a
message; nothing is swallowed and nothing waits for ever.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, TypeAlias, cast
from uuid import UUID

from distributed import Client
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed

from prefect_htcdask.compat.dask import on_end, wait_for_end
from prefect_htcdask.errors import HTCDaskError
from prefect_htcdask.runner.client.connection import Connection, connection_of
from prefect_htcdask.runner.futures.batching import MAX_BATCH, batch_delay, batch_size
from prefect_htcdask.runner.futures.compact_state import CompactState
from prefect_htcdask.runner.futures.crash_reasons import JobOutcomes, crash_exception, last_worker
from prefect_htcdask.runner.futures.pending_result import PENDING_STATUSES, PendingResult
from prefect_htcdask.runner.futures.prefetch import Prefetcher
from prefect_htcdask.runner.futures.result_sizes import ResultSizes
from prefect_htcdask.utils.aio import in_thread
from prefect_htcdask.utils.prefect_client import open_client
from prefect_htcdask.worker.portable_states import is_unreadable
from prefect_htcdask.worker.secede import seceded

POLL = 0.5
"""Seconds between two looks at a blocked wait: a thread that waits in C for ever hears no timeout of a flow run."""

MAX_GATHERS = 4
"""Gathers at a time: a large result on its way does not hold up the small ones."""

MAX_BROKEN = 10
"""Times that the gathering of one state may break off. Each time that the client finds its connection broken, it waits
until that is there again; so this many have another reason."""

API_LAG = 10.0
"""Seconds in which Prefect's server records the task runs of a flow run that has ended."""

_Call: TypeAlias = "tuple[UUID, Callable[[], object]]"

logger = logging.getLogger("prefect.task_runner.htcdask")


class Gatherer:
    """Gathers final states for the task runs of one Dask client.

    Args:
        connection: that of the client that the Dask futures belong to.
        on_lost: called, in a background thread, with a task run that Dask could not finish and the Crashed state
            that it got.
        job_outcomes: what is known of the workers' jobs, for the message of a lost task run.
        on_collected: called, in the client's event loop, with task runs that have got their final states.

    Attributes:
        on_first: called there once, before anybody learns of the first final state that comes.
    """

    def __init__(
        self,
        connection: Connection,
        on_lost: Callable[[PendingResult, State[Any]], None] | None = None,
        job_outcomes: JobOutcomes | None = None,
        on_collected: Callable[[list[PendingResult]], None] | None = None,
    ) -> None:
        self._connection = connection
        self.client = connection.client
        self._on_collected = on_collected
        self.on_first: Callable[[], None] | None = None
        self.closed_at: float | None = None
        self.cancelled = False  # by the flow run: then what Dask cancels has not crashed
        self.job_outcomes = job_outcomes or JobOutcomes()
        self._condition = threading.Condition()
        self._on_lost = on_lost
        self._asked: dict[int, PendingResult] = {}
        self._ahead: set[int] = set()
        self._awaited: Counter[int] = Counter()
        self._unheard: list[PendingResult] = []
        self._ready: deque[PendingResult] = deque()
        self._gathers = 0
        self._sizes = ResultSizes()
        self._began = 0.0
        self._looking = False
        self._due = math.inf
        self._broken: dict[int, int] = {}
        self._failure: HTCDaskError | None = None
        self.read_ahead: Prefetcher[PendingResult] = Prefetcher()
        self._callbacks = ThreadPoolExecutor(1, thread_name_prefix="htcdask-callbacks")

    def request(self, result: PendingResult) -> bool:
        """Bring the final state of `result` here as soon as there is one; False where that was asked for before."""
        with self._condition:
            self._ahead.discard(id(result))
        return self._ask(result)

    def _ask(self, result: PendingResult) -> bool:
        with self._condition:
            if result.packed is not None or id(result) in self._asked or self.closed:
                return False
            self._asked[id(result)] = result
            failure = self._failure
        if failure is not None:
            self._end(result, failure)
        elif result.dask_future.status in PENDING_STATUSES:
            if result.spec is not None:
                self._connection.flush_soon(result.spec)
            self._listen_soon(result)
        else:
            self._enqueue(result)
        return True

    def wait(self, result: PendingResult, timeout: float | None, *, of_many: bool = False) -> None:
        """Block until `result` has its final state, or `timeout` seconds are over.

        Once this collector is closed, the state is the one that the Prefect API has, if any.

        Args:
            of_many: whether it is one of many that are waited for, and no sooner used than the others.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        in_turn = self.read_ahead.take(result)
        with self._blocked_on(result) if not (of_many or in_turn) else nullcontext():
            if not self.request(result):
                # Ready perhaps, and held back.
                self._look_soon()
            if in_turn and not of_many:
                self._ask_ahead(self.read_ahead.beside(result, self._sizes.expected(result.task_name)))
            with seceded(result.packed is None), self._condition:
                while result.packed is None and not self.closed:
                    left = min(POLL, deadline - time.monotonic())
                    if left <= 0:
                        return
                    self._condition.wait(left)
        if result.packed is None:
            self._ask_api(result, deadline)

    def _ask_api(self, result: PendingResult, deadline: float) -> None:
        """Take the final state from the Prefect API: Dask's part of the flow run is over."""
        deadline = min(deadline, (self.closed_at or 0.0) + API_LAG)
        with open_client(timeout=None, retries=None) as api:
            while True:
                state: State[Any] | None = None
                with suppress(ObjectNotFound):
                    state = api.read_task_run(result.task_run_id).state
                if state is not None and state.is_final():
                    self.set_state(result, state)
                    return
                if time.monotonic() > deadline:
                    return
                time.sleep(0.2)

    def call_back(self, result: PendingResult, call: Callable[[], object]) -> bool:
        """Have `call` called, in another thread, once the final state of `result` is here.

        Returns:
            False where it is here already, or this collector is closed; then it is not called.
        """
        with self._condition:
            if result.packed is not None or self.closed:
                return False
            result.callbacks += (call,)
            self.request(result)
            return True

    def _ask_ahead(self, results: list[PendingResult]) -> None:
        # All at once: nothing is gathered in between.
        with self._condition:
            for result in results if self._failure is None else ():
                if self._ask(result):
                    self._ahead.add(id(result))

    @contextmanager
    def _blocked_on(self, result: PendingResult) -> Iterator[None]:
        with self._condition:
            self._awaited[id(result)] += 1
        try:
            yield
        finally:
            with self._condition:
                self._awaited[id(result)] -= 1
                if not self._awaited[id(result)]:
                    del self._awaited[id(result)]

    def fail(self, error: HTCDaskError) -> None:
        """End every task run that is being waited for, and every one that is asked for later, with `error`."""
        with self._condition:
            self._failure = self._failure or error
            waiting = [result for result in self._asked.values() if result.packed is None]
        for result in waiting:
            self._end(result, error)

    @property
    def failure(self) -> HTCDaskError | None:
        """Why no state comes any more, if so."""
        return self._failure

    def close(self) -> None:
        """Run the callbacks that are due, and take no more; finished work that is not here by now will not come.

        Call it before the client closes, which makes finished futures cancelled ones.
        """
        with self._condition:
            self.closed_at = time.monotonic()
            self._ready = deque(result for result in self._ready if result.dask_future.status != "finished")
            left = [one for one in self._asked.values() if one.callbacks and one.dask_future.status == "finished"]
            self._condition.notify_all()
        self._callbacks.shutdown(wait=False)
        if left:
            threading.Thread(target=self._call_late, args=(left,), name="htcdask-callbacks", daemon=True).start()

    @property
    def closed(self) -> bool:
        """Whether no state comes any more, without a failure that would be the reason."""
        return self.closed_at is not None and self._failure is None

    def set_state(self, result: PendingResult, state: State[Any]) -> None:
        """Take the final state of `result` from elsewhere, unless it is here."""
        with self._condition:
            if result.packed is not None:
                return
            result.packed = CompactState(state)
        self._finish([result])

    def _listen_soon(self, result: PendingResult) -> None:
        with self._condition:
            listening = bool(self._unheard)
            self._unheard.append(result)
        if not listening:
            cast(Any, self.client.loop).add_callback(self._listen)

    def _listen(self) -> None:
        """Hear of the ends of the task runs that were asked for since; in the event loop."""
        with self._condition:
            unheard, self._unheard = self._unheard, []
        for result in unheard:
            on_end(result.dask_future, partial(self._enqueue, result))

    def _enqueue(self, result: PendingResult) -> None:
        with self._condition:
            self._ready.append(result)
        self._look_soon()

    def _look_soon(self) -> None:
        with self._condition:
            looking, self._looking = self._looking, True
        if not looking:
            cast(Any, self.client.loop).add_callback(self._look)

    def _look(self) -> None:
        """Gather what is ready, now or in a moment: many task runs that end together cost one round trip."""
        loop = cast(Any, self.client.loop)
        now = time.monotonic()
        batches: list[list[PendingResult]] = []
        with self._condition:
            self._looking = False
            while self._ready and self._gathers < MAX_GATHERS:
                ready = list(itertools.islice(self._ready, MAX_BATCH))
                size = batch_size(self._sizes.expected(result.task_name) for result in ready)
                full = size < len(self._ready) or size == MAX_BATCH
                awaited = not full and any(id(result) in self._awaited for result in ready)
                pause = batch_delay(full, len(self._asked), awaited, now - self._began)
                if pause:
                    if now + pause < self._due:
                        self._due = now + pause
                        loop.call_later(pause, self._look_again)
                    break
                self._began = now
                self._gathers += 1
                batches.append([self._ready.popleft() for _ in range(size)])
        for batch in batches:
            loop.add_callback(self._gather_and_look, batch)

    def _look_again(self) -> None:
        self._due = math.inf
        self._look()

    async def _enqueue_when_back(self, result: PendingResult) -> None:
        await wait_for_end(result.dask_future)
        self._enqueue(result)

    async def _gather_and_look(self, batch: list[PendingResult]) -> None:
        try:
            await self._gather(batch)
        finally:
            with self._condition:
                self._gathers -= 1
            self._look_soon()

    async def _gather(self, batch: list[PendingResult]) -> None:
        finished = {one.key: one for one in batch if one.dask_future.status == "finished"}
        try:
            states = await self._connection.gather({key: result.dask_future for key, result in finished.items()})
        except Exception as exc:
            if len(finished) > 1 and not isinstance(exc, OSError) and not self.closed:
                # A result that cannot be pickled, or unpickled here, says nothing of the others.
                half = len(batch) // 2
                for part in (batch[:half], batch[half:]):
                    await self._gather(part)
                return
            states = dict.fromkeys(finished)
            for result in finished.values():
                if self.closed or self._only_ahead(result) or (isinstance(exc, OSError) and self._try_again(result)):
                    batch.remove(result)
                elif result.dask_future.status == "finished":
                    self._end(result, exc)
        first, self.on_first = self.on_first, None
        if first is not None:
            try:
                await in_thread(first)
            except Exception:
                logger.exception("Error as the first final state came")
        ended: list[PendingResult] = []
        lost: list[PendingResult] = []
        for result in batch:
            key = result.key
            state = states.get(key)
            if isinstance(state, State):
                unreadable = is_unreadable(state)
                if unreadable and self._only_ahead(result):
                    continue  # other tasks may be able to use it
                result.packed = CompactState(state)
                ended.append(result)
                if unreadable:
                    self._report_lost(result, state)
            elif result.packed is not None or (self.closed and key in finished):
                continue  # it has its end, or its client has closed meanwhile
            elif result.dask_future.status in PENDING_STATUSES:
                cast(Any, self.client.loop).add_callback(self._enqueue_when_back, result)
            # What is finished without being here was lost as this began, and has been computed again.
            elif result.dask_future.status != "finished" or not self._try_again(result):
                lost.append(result)
        # What failed says nothing of how large a result is.
        whole = [(one.task_name, one.packed.data) for one in ended if one.packed is not None and one.packed.has_result]
        with suppress(Exception):
            self._sizes.saw(whole)
        if self._on_collected is not None and ended:
            self._on_collected(ended)
        self._finish(ended)
        for result in lost:
            if (killer := last_worker(result)) is None:
                self._end(result, None)
            else:
                cast(Any, self.client.loop).add_callback(self._end_when_explained, result, killer)

    async def _end_when_explained(self, result: PendingResult, killer: str) -> None:
        await self.job_outcomes.wait_for(killer)
        self._end(result, None)

    def _only_ahead(self, result: PendingResult) -> bool:
        """Forget that a state was asked for, unless somebody has asked for that very one."""
        with self._condition:
            if id(result) not in self._ahead or result.callbacks:
                return False
            self._ahead.discard(id(result))
            self._asked.pop(id(result), None)
            return True

    def _try_again(self, result: PendingResult) -> bool:
        """Gather a state later, once the client says that its task goes on; False after too many times."""
        with self._condition:
            times = self._broken[id(result)] = self._broken.get(id(result), 0) + 1
        if times > MAX_BROKEN:
            return False
        loop = cast(Any, self.client.loop)
        loop.call_later(POLL, loop.add_callback, self._enqueue_when_back, result)
        return True

    def _end(self, result: PendingResult, error: BaseException | None) -> None:
        """Give a task run that Dask did not finish a Crashed state."""
        if error is None:
            error = crash_exception(result, self.job_outcomes)
        cancelled = self.cancelled and result.dask_future.status == "cancelled"
        state: State[Any] = (Cancelled if cancelled else Crashed)(message=str(error) or repr(error), data=error)
        state.state_details.task_run_id = result.task_run_id
        with self._condition:
            if result.packed is not None:
                return
            result.packed = CompactState(state)
        self._report_lost(result, state)
        self._finish([result])

    def _report_lost(self, result: PendingResult, state: State[Any]) -> None:
        if self._on_lost is None:
            return
        try:
            self._on_lost(result, state)
        except Exception:
            logger.exception("Could not report that task run %s crashed", result.task_run_id)

    def _finish(self, results: list[PendingResult]) -> None:
        with self._condition:
            calls: list[_Call] = []
            for result in results:
                self._asked.pop(id(result), None)
                self._ahead.discard(id(result))
                self._broken.pop(id(result), None)
                calls += [(result.task_run_id, call) for call in result.callbacks]
                result.let_go()
            self._condition.notify_all()
        if calls:
            try:
                self._callbacks.submit(_call_all, calls)
            except RuntimeError:  # closed
                with suppress(RuntimeError):  # so is this process
                    threading.Thread(target=_call_all, args=(calls,), name="htcdask-callbacks", daemon=True).start()

    def _call_late(self, results: list[PendingResult]) -> None:
        """Call whoever waits for what had finished, and was not here, as this collector closed."""
        for result in results:
            with suppress(Exception):
                self.wait(result, None)
            # Not even the Prefect API knows the end of what has callbacks still.
            calls, result.callbacks = result.callbacks, ()
            _call_all([(result.task_run_id, call) for call in calls])


def _call_all(calls: list[_Call]) -> None:
    """Call those who asked to be called; what one of them raises goes to the log."""
    for task_run_id, call in calls:
        try:
            call()
        except Exception:
            logger.exception("Error in a done-callback of task run %s", task_run_id)


_lock = threading.Lock()
_gatherers: dict[str, Gatherer] = {}


def gatherer_of(client: Client) -> Gatherer:
    """This process's collector for a client that no live run owns, such as a worker's own: one for each client.

    Those of clients that have closed meanwhile are closed.
    """
    with _lock:
        for key in [key for key, gatherer in _gatherers.items() if gatherer.client.status == "closed"]:
            _gatherers.pop(key).close()
        gatherer = _gatherers.get(client.id)
        if gatherer is None:
            gatherer = _gatherers[client.id] = Gatherer(connection_of(client))
        return gatherer
