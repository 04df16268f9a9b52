"""Brings the final states of futures home in bulk, once somebody asks for them.

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
from typing import TYPE_CHECKING, Any, cast

from distributed import Client, Future
from distributed.utils_comm import retry_operation
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Crashed

from prefect_htcdask.done_callbacks import call_all, call_late
from prefect_htcdask.errors import HTCDaskError
from prefect_htcdask.future_ends import on_end
from prefect_htcdask.gathering import MAX_BATCH, batch_size, held_back
from prefect_htcdask.losses import JobFates, killer_of, lost_reason
from prefect_htcdask.packed_states import PackedState
from prefect_htcdask.portable_states import is_unreadable
from prefect_htcdask.read_ahead import ReadAhead
from prefect_htcdask.reconnection import ResumingClient
from prefect_htcdask.result_sizes import ResultSizes
from prefect_htcdask.threads import in_thread
from prefect_htcdask.worker_slots import worker_slot_freed

if TYPE_CHECKING:
    from prefect_htcdask.futures import HTCDaskFuture

POLL = 0.5
"""Seconds between two looks at a blocked wait: a thread that waits in C for ever hears no timeout of a flow run."""

COMING = ("pending", "lost")
"""Status of Dask futures that are still to come: what was lost is computed again."""

MAX_GATHERS = 4
"""Gathers at a time: a large result on its way does not hold up the small ones."""

MAX_BROKEN = 10
"""Times that the gathering of one future may break off. Each time that the client finds its connection broken, it waits
until that is there again; so this many have another reason."""

logger = logging.getLogger("prefect.task_runner.htcdask")


class Collector:
    """Gathers final states for the futures of one Dask client.

    Args:
        client: the client that the futures belong to.
        on_lost: called, in a background thread, with a future that Dask could not finish and the Crashed state that
            it got.
        fates: what is known of the workers' jobs, for the message of a lost task run.
        on_collected: called, in the client's event loop, with futures that have got their final states.

    Attributes:
        on_first: called there once, before anybody learns of the first final state that comes.
    """

    def __init__(
        self,
        client: Client,
        on_lost: Callable[[HTCDaskFuture[Any], State[Any]], None] | None = None,
        fates: JobFates | None = None,
        on_collected: Callable[[list[HTCDaskFuture[Any]]], None] | None = None,
    ) -> None:
        self.client = client
        self._on_collected = on_collected
        self.on_first: Callable[[], None] | None = None
        self.closed_at: float | None = None
        self.cancelled = False  # by the flow run: then what Dask cancels has not crashed
        self.fates = fates or JobFates()
        self.condition = threading.Condition()
        self._on_lost = on_lost
        self._asked: dict[int, HTCDaskFuture[Any]] = {}
        self._ahead: set[int] = set()
        self._awaited: Counter[int] = Counter()
        self._unheard: list[HTCDaskFuture[Any]] = []
        self._ready: deque[HTCDaskFuture[Any]] = deque()
        self._gathers = 0
        self._sizes = ResultSizes()
        self._began = 0.0
        self._looking = False
        self._due = math.inf
        self._broken: dict[int, int] = {}
        self._failure: HTCDaskError | None = None
        self.read_ahead: ReadAhead[HTCDaskFuture[Any]] = ReadAhead()
        self._callbacks = ThreadPoolExecutor(1, thread_name_prefix="htcdask-callbacks")

    def ask(self, future: HTCDaskFuture[Any]) -> bool:
        """Bring the final state of `future` here as soon as there is one; False where that was asked for before."""
        with self.condition:
            self._ahead.discard(id(future))
        return self._ask(future)

    def _ask(self, future: HTCDaskFuture[Any]) -> bool:
        with self.condition:
            if future.packed is not None or id(future) in self._asked or self.over:
                return False
            self._asked[id(future)] = future
            failure = self._failure
        if failure is not None:
            self._end(future, failure)
        elif future.wrapped_future.status in COMING:
            spec = future.spec
            if spec is not None and isinstance(self.client, ResumingClient):
                self.client.outbox.hurry(spec)
            self._listen_soon(future)
        else:
            self._enqueue(future)
        return True

    def wait(self, future: HTCDaskFuture[Any], timeout: float | None, *, of_many: bool = False) -> None:
        """Block until `future` has its final state, this collector is closed, or `timeout` seconds are over.

        Args:
            of_many: whether it is one of many that are waited for, and no sooner used than the others.
        """
        in_turn = self.read_ahead.take(future)
        with self._blocked_on(future) if not (of_many or in_turn) else nullcontext():
            if not self.ask(future):
                # Ready perhaps, and held back.
                self._look_soon()
            if in_turn and not of_many:
                self._ask_ahead(self.read_ahead.beside(future, self._sizes.expected(future.task_name)))
            deadline = None if timeout is None else time.monotonic() + timeout
            with worker_slot_freed(future.packed is None), self.condition:
                while future.packed is None and not self.over:
                    left = POLL if deadline is None else min(POLL, deadline - time.monotonic())
                    if left <= 0:
                        return
                    self.condition.wait(left)

    def _ask_ahead(self, futures: list[HTCDaskFuture[Any]]) -> None:
        # All at once: nothing is gathered in between.
        with self.condition:
            for future in futures if self._failure is None else ():
                if self._ask(future):
                    self._ahead.add(id(future))

    @contextmanager
    def _blocked_on(self, future: HTCDaskFuture[Any]) -> Iterator[None]:
        with self.condition:
            self._awaited[id(future)] += 1
        try:
            yield
        finally:
            with self.condition:
                self._awaited[id(future)] -= 1
                if not self._awaited[id(future)]:
                    del self._awaited[id(future)]

    def fail(self, error: HTCDaskError) -> None:
        """End every future that is being waited for, and every one that is asked for later, with `error`."""
        with self.condition:
            self._failure = self._failure or error
            waiting = [future for future in self._asked.values() if future.packed is None]
        for future in waiting:
            self._end(future, error)

    @property
    def failure(self) -> HTCDaskError | None:
        """Why no future of this collector will come, if so."""
        return self._failure

    def close(self) -> None:
        """Run the callbacks that are due, and take no more; finished work that is not here by now will not come.

        Call it before the client closes, which makes finished futures cancelled ones.
        """
        with self.condition:
            self.closed_at = time.monotonic()
            self._ready = deque(future for future in self._ready if future.wrapped_future.status != "finished")
            left = [one for one in self._asked.values() if one._callbacks and one.wrapped_future.status == "finished"]
            self.condition.notify_all()
        self._callbacks.shutdown(wait=False)
        if left:
            threading.Thread(target=call_late, args=(left,), name="htcdask-callbacks", daemon=True).start()

    @property
    def over(self) -> bool:
        """Whether no state comes any more, without a failure that would be the reason."""
        return self.closed_at is not None and self._failure is None

    def give(self, future: HTCDaskFuture[Any], state: State[Any]) -> None:
        """Take the final state of `future` from elsewhere, unless it is here."""
        with self.condition:
            if future.packed is not None:
                return
            future.packed = PackedState(state)
        self._finish([future])

    def _listen_soon(self, future: HTCDaskFuture[Any]) -> None:
        with self.condition:
            listening = bool(self._unheard)
            self._unheard.append(future)
        if not listening:
            cast(Any, self.client.loop).add_callback(self._listen)

    def _listen(self) -> None:
        """Hear of the ends of the futures that were asked for since; in the event loop."""
        with self.condition:
            unheard, self._unheard = self._unheard, []
        for future in unheard:
            on_end(future.wrapped_future, partial(self._enqueue, future))

    def _enqueue(self, future: HTCDaskFuture[Any]) -> None:
        with self.condition:
            self._ready.append(future)
        self._look_soon()

    def _look_soon(self) -> None:
        with self.condition:
            looking, self._looking = self._looking, True
        if not looking:
            cast(Any, self.client.loop).add_callback(self._look)

    def _look(self) -> None:
        """Gather what is ready, now or in a moment: many futures that end together cost one round trip."""
        loop = cast(Any, self.client.loop)
        now = time.monotonic()
        batches: list[list[HTCDaskFuture[Any]]] = []
        with self.condition:
            self._looking = False
            while self._ready and self._gathers < MAX_GATHERS:
                ready = list(itertools.islice(self._ready, MAX_BATCH))
                size = batch_size(self._sizes.expected(future.task_name) for future in ready)
                full = size < len(self._ready) or size == MAX_BATCH
                awaited = not full and any(id(future) in self._awaited for future in ready)
                pause = held_back(full, len(self._asked), awaited, now - self._began)
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

    async def _enqueue_when_back(self, future: HTCDaskFuture[Any]) -> None:
        await cast(Any, future.wrapped_future)._state.wait()
        self._enqueue(future)

    async def _gather_and_look(self, batch: list[HTCDaskFuture[Any]]) -> None:
        try:
            await self._gather(batch)
        finally:
            with self.condition:
                self._gathers -= 1
            self._look_soon()

    async def _gather(self, batch: list[HTCDaskFuture[Any]]) -> None:
        finished = {str(f.wrapped_future.key): f for f in batch if f.wrapped_future.status == "finished"}
        try:
            states = await self._states({key: future.wrapped_future for key, future in finished.items()})
        except Exception as exc:
            if len(finished) > 1 and not isinstance(exc, OSError) and not self.over:
                # A result that cannot be pickled, or unpickled here, says nothing of the others.
                half = len(batch) // 2
                for part in (batch[:half], batch[half:]):
                    await self._gather(part)
                return
            states = dict.fromkeys(finished)
            for future in finished.values():
                if self.over or self._only_ahead(future) or (isinstance(exc, OSError) and self._try_again(future)):
                    batch.remove(future)
                elif future.wrapped_future.status == "finished":
                    self._end(future, exc)
        first, self.on_first = self.on_first, None
        if first is not None:
            try:
                await in_thread(first)
            except Exception:
                logger.exception("Error as the first final state came")
        ended: list[HTCDaskFuture[Any]] = []
        lost: list[HTCDaskFuture[Any]] = []
        for future in batch:
            key = str(future.wrapped_future.key)
            state = states.get(key)
            if isinstance(state, State):
                unreadable = is_unreadable(state)
                if unreadable and self._only_ahead(future):
                    continue  # other tasks may be able to use it
                future.packed = PackedState(state)
                ended.append(future)
                if unreadable:
                    self._report_lost(future, state)
            elif future.packed is not None or (self.over and key in finished):
                continue  # it has its end, or its client has closed meanwhile
            elif future.wrapped_future.status in COMING:
                cast(Any, self.client.loop).add_callback(self._enqueue_when_back, future)
            # What is finished without being here was lost as this began, and has been computed again.
            elif future.wrapped_future.status != "finished" or not self._try_again(future):
                lost.append(future)
        # What failed says nothing of how large a result is.
        whole = [(one.task_name, one.packed.data) for one in ended if one.packed is not None and one.packed.has_result]
        with suppress(Exception):
            self._sizes.saw(whole)
        if self._on_collected is not None and ended:
            self._on_collected(ended)
        self._finish(ended)
        for future in lost:
            if (killer := killer_of(future)) is None:
                self._end(future, None)
            else:
                cast(Any, self.client.loop).add_callback(self._end_when_explained, future, killer)

    async def _end_when_explained(self, future: HTCDaskFuture[Any], killer: str) -> None:
        await self.fates.wait_for(killer)
        self._end(future, None)

    async def _states(self, finished: dict[str, Future[Any]]) -> dict[str, Any]:
        if isinstance(self.client, ResumingClient) and not self.client.direct_to_workers and finished:
            # What `Client.gather` asks of the scheduler then, without a coroutine for each future.
            answer = await retry_operation(cast(Any, self.client.scheduler).gather, keys=list(finished))
            if answer["status"] == "OK":
                return cast("dict[str, Any]", answer["data"])
        # It has what cannot be had computed again.
        return cast("dict[str, Any]", await self.client.gather(finished, errors="skip", asynchronous=True))

    def _only_ahead(self, future: HTCDaskFuture[Any]) -> bool:
        """Forget that a future was asked for, unless somebody has asked for that very one."""
        with self.condition:
            if id(future) not in self._ahead or future._callbacks:
                return False
            self._ahead.discard(id(future))
            self._asked.pop(id(future), None)
            return True

    def _try_again(self, future: HTCDaskFuture[Any]) -> bool:
        """Gather a future later, once the client says that its task goes on; False after too many times."""
        with self.condition:
            times = self._broken[id(future)] = self._broken.get(id(future), 0) + 1
        if times > MAX_BROKEN:
            return False
        loop = cast(Any, self.client.loop)
        loop.call_later(POLL, loop.add_callback, self._enqueue_when_back, future)
        return True

    def _end(self, future: HTCDaskFuture[Any], error: BaseException | None) -> None:
        """Give a future that Dask did not finish a Crashed state."""
        if error is None:
            error = lost_reason(future, self.fates)
        cancelled = self.cancelled and future.wrapped_future.status == "cancelled"
        state: State[Any] = (Cancelled if cancelled else Crashed)(message=str(error) or repr(error), data=error)
        state.state_details.task_run_id = future._task_run_id
        with self.condition:
            if future.packed is not None:
                return
            future.packed = PackedState(state)
        self._report_lost(future, state)
        self._finish([future])

    def _report_lost(self, future: HTCDaskFuture[Any], state: State[Any]) -> None:
        if self._on_lost is None:
            return
        try:
            self._on_lost(future, state)
        except Exception:
            logger.exception("Could not report that task run %s crashed", future._task_run_id)

    def _finish(self, futures: list[HTCDaskFuture[Any]]) -> None:
        with self.condition:
            calls = []
            for future in futures:
                self._asked.pop(id(future), None)
                self._ahead.discard(id(future))
                self._broken.pop(id(future), None)
                calls += [(fn, future) for fn in future._callbacks]
                future.let_go()
            self.condition.notify_all()
        if calls:
            try:
                self._callbacks.submit(call_all, calls)
            except RuntimeError:  # closed
                with suppress(RuntimeError):  # so is this process
                    threading.Thread(target=call_all, args=(calls,), name="htcdask-callbacks", daemon=True).start()
