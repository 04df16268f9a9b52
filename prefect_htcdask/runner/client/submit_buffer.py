"""Submits that follow one another closely go to the scheduler in one graph.

A graph costs client and scheduler some milliseconds of CPU, however small it is. The first submit after a pause is sent
at once; those that come within the next moment go together at its end, or as soon as somebody asks for one of them.
Dask's future of a task is there before its graph is sent, and waits as it would for the task.
"""

from __future__ import annotations

import contextvars
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol, cast

from dask.base import annotate
from distributed import Client, Future

from prefect_htcdask.compat.dask import send
from prefect_htcdask.errors import TaskRunLost
from prefect_htcdask.runner.client.task_spec import TaskSpec

INTERVAL = 0.05
"""Seconds from one graph to the next, where submits follow one another."""

PATIENCE = 1.0
"""Seconds for which what has to come after the submits waits for a graph that is just being sent."""

MOST_BYTES = 1024**2
"""Bytes of parameters that wait at most; Dask warns of graphs of ten times this size."""


class SendingClient(Protocol):
    """What an outbox needs of its client beside `distributed.Client`'s own."""

    futures: dict[Any, Any]

    @property
    def specs(self) -> MutableMapping[str, TaskSpec]:
        """The tasks that it submits again over a new connection, by their keys."""

    def connected(self) -> AbstractContextManager[None]:
        """While it lasts, the connection is there and is not renewed; raises `TaskRunLost` where it was given up."""


class SubmitBuffer:
    """What is on its way to the scheduler of one client.

    Args:
        client: sends it; what it could not send as its connection broke, it submits again by its own means.

    Attributes:
        interval: seconds between two graphs at least.
    """

    def __init__(self, client: SendingClient) -> None:
        self._client = client
        self.interval = INTERVAL
        self._lock = threading.Lock()
        # Graphs leave one at a time, so that none overtakes one on which it depends.
        self._sending = threading.Lock()
        self._waiting: list[tuple[TaskSpec, object]] = []
        self._bytes = 0
        self._sent_at = -math.inf
        self._timer: threading.Timer | None = None
        self._at_once = False

    def add(self, spec: TaskSpec, holds: object) -> Future[Any]:
        """Send a task soon; returns its future.

        Args:
            spec: the task, with the options that it is sent with.
            holds: what must live until it is sent.

        Raises:
            TaskRunLost: the connection to the scheduler was given up.
        """
        future: Future[Any] = Future(spec.key, cast(Client, self._client))
        with self._lock:
            self._client.specs[spec.key] = spec
            self._waiting.append((spec, holds))
            self._bytes += len(spec.payload)
            left = self.interval - (time.monotonic() - self._sent_at)
            if left > 0 and self._bytes <= MOST_BYTES:
                if self._timer is None:
                    self._start_timer(left)
                return future
        self.flush()
        return future

    def flush_soon(self, spec: TaskSpec) -> None:
        """Send a task that still waits, and all that waits with it: somebody asks for it. Does not block."""
        if spec.sent:
            return
        with self._lock:
            if self._timer is not None and not self._at_once:
                self._at_once = True
                self._timer.cancel()
                self._start_timer(0.0)

    def flush(self, timeout: float = -1) -> None:
        """Send what waits, now, once there is a connection. Not to be called in the client's event loop.

        Args:
            timeout: seconds to wait for a graph that another thread is just sending; negative: as long as it takes.

        Raises:
            TaskRunLost: the connection to the scheduler was given up; what waited is cancelled.
        """
        with self.held(timeout) as held:
            if held:
                # A task has the annotations of its own submit, and not those of whoever happens to send it.
                contextvars.Context().run(self._send_waiting)

    @contextmanager
    def held(self, timeout: float = -1) -> Iterator[bool]:
        """Let nothing leave meanwhile; gives whether that came about within `timeout` seconds."""
        held = self._sending.acquire(timeout=timeout)
        try:
            yield held
        finally:
            if held:
                self._sending.release()

    def _start_timer(self, seconds: float) -> None:
        timer = threading.Timer(seconds, self._send_late)
        timer.name, timer.daemon = "htcdask-submit", True
        timer.start()
        self._timer = timer

    def _send_late(self) -> None:
        with self._lock:
            self._timer, self._at_once = None, False
        # The futures of what could not be sent tell of it.
        with suppress(TaskRunLost):
            self.flush()

    def _send_waiting(self) -> None:
        with self._lock:
            specs = [spec for spec, _ in self._waiting]
            if specs:
                self._sent_at = time.monotonic()
        if not specs:
            return
        try:
            with self._client.connected():
                self._send(specs)
        except TaskRunLost as exc:
            self._give_up([spec for spec in specs if not spec.sent], exc)
            raise
        finally:
            # Whatever is left after an interrupt goes with the next.
            with self._lock:
                self._waiting = [(spec, holds) for spec, holds in self._waiting if not spec.sent]
                self._bytes = sum(len(spec.payload) for spec, _ in self._waiting)
                if self._timer is not None and not self._waiting:
                    self._timer.cancel()
                    self._timer, self._at_once = None, False
                elif self._timer is None and self._waiting:
                    self._start_timer(self.interval)

    def _send(self, specs: list[TaskSpec]) -> None:
        for spec in specs:
            # Those that were cancelled meanwhile; others were submitted again over a new connection.
            spec.sent = spec.sent or not self._is_wanted(spec.key)
        for group in graph_batches((spec for spec in specs if not spec.sent), self._is_wanted):
            nodes = {spec.key: spec.node() for spec in group}
            options = group[0].options
            try:
                with annotate(**options.annotations):
                    send(
                        cast(Client, self._client),
                        nodes,
                        nodes,
                        {spec.key: spec.number for spec in group},
                        options.resources,
                    )
            except Exception as exc:
                self._give_up(group, exc)
            for spec in group:
                spec.sent = True

    def _is_wanted(self, key: str) -> bool:
        state = self._client.futures.get(key)
        return state is not None and state.status != "cancelled"

    def _give_up(self, specs: list[TaskSpec], error: Exception) -> None:
        for spec in specs:
            spec.sent = True
        cast(Any, self._client).loop.add_callback(self._cancel, specs, str(error) or repr(error))

    def _cancel(self, specs: list[TaskSpec], why: str) -> None:
        for spec in specs:
            state = self._client.futures.get(spec.key)
            if state is not None and state.status == "pending":
                state.cancel(reason="not sent", msg=why)


def graph_batches(specs: Iterable[TaskSpec], is_there: Callable[[str], bool]) -> Iterator[list[TaskSpec]]:
    """The graphs in which tasks are sent, in their order.

    One graph has one set of options. A task that needs what is not there goes alone, since the scheduler cancels the
    whole of a graph of which it misses any part.

    Args:
        specs: the tasks, each behind those that it needs.
        is_there: whether a task, by its key, is among these or at the scheduler, as far as is known.
    """
    group: list[TaskSpec] = []
    lost: set[str] = set()
    for spec in specs:
        upstreams = spec.upstream_keys()
        sound = lost.isdisjoint(upstreams) and all(is_there(key) for key in upstreams)
        if group and (not sound or group[0].options != spec.options):
            yield group
            group = []
        if sound:
            group.append(spec)
        else:
            lost.add(spec.key)
            yield [spec]
    if group:
        yield group


class BufferedClient(Client):
    """A Dask client on which what a user sends himself comes after what waits in its outbox."""

    submit_buffer: SubmitBuffer | None = None

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        """As `distributed.Client.submit`."""
        self.flush_submits()
        return super().submit(*args, **kwargs)

    def map(self, *args: Any, **kwargs: Any) -> Any:
        """As `distributed.Client.map`."""
        self.flush_submits()
        return super().map(*args, **kwargs)

    def get(self, *args: Any, **kwargs: Any) -> Any:
        """As `distributed.Client.get`."""
        self.flush_submits()
        return super().get(*args, **kwargs)

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        """As `distributed.Client.compute`."""
        self.flush_submits()
        return super().compute(*args, **kwargs)

    def persist(self, *args: Any, **kwargs: Any) -> Any:
        """As `distributed.Client.persist`."""
        self.flush_submits()
        return super().persist(*args, **kwargs)

    def cancel(self, *args: Any, **kwargs: Any) -> Any:
        """As `distributed.Client.cancel`; what has not left yet never will."""
        if self.submit_buffer is None or self.asynchronous:
            return super().cancel(*args, **kwargs)
        with self.submit_buffer.held(PATIENCE):
            return super().cancel(*args, **kwargs)

    def flush_submits(self) -> None:
        """Send what waits in the outbox; does not raise. Nothing in the client's own event loop."""
        if self.submit_buffer is not None and not self.asynchronous:
            with suppress(TaskRunLost):
                self.submit_buffer.flush(PATIENCE)
