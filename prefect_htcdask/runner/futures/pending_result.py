"""Records of task runs on Dask, each from its submission until its final state is in hand.

A future holds the record of its task run, and so does whoever brings the state home, tells of it or needs it further
on. What they share stands there, and the future itself may be dropped meanwhile.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

from distributed import Client, Future

from prefect_htcdask.runner.futures.compact_state import CompactState

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State
    from prefect.tasks import Task

    from prefect_htcdask.runner.client.task_spec import TaskSpec

PENDING_STATUSES = ("pending", "lost")
"""Status of Dask futures that are still to come: what was lost is computed again."""


class CollectedFuture:
    """Stands for Dask's future of a task run whose final state is in hand, and of which Dask has let go.

    It is a fraction of the other's size. Nothing can be submitted that depends on it; the state serves for that.
    """

    __slots__ = ("_packed", "client", "key")
    status = "finished"

    def __init__(self, key: str, client: Client, packed: CompactState) -> None:
        self.key = key
        self.client = client
        self._packed = packed

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.key}>"

    def result(self, timeout: float | None = None) -> State[Any]:
        """The final state, at once."""
        return self._packed.state

    def done(self) -> bool:
        """Whether the task has ended: it has."""
        return True

    def cancelled(self) -> bool:
        """Whether the task was cancelled: it was not."""
        return False


class PendingResult:
    """A task run on Dask whose final state is to come, and later that state.

    Args:
        task_run_id: the task run's id.
        dask_future: Dask's future of the final state.
        task_name: the task's name.
        task: the task, where this process knows it.
        upstreams: what is kept while this task run may still need it (`recovery`), though the user dropped it: records,
            and Dask's futures.
        spec: what it takes to submit the task again, where its client may have to.

    Attributes:
        dask_future: a `CollectedFuture` from when Dask has let go.
        packed: the final state, from when it is in hand.
        callbacks: called once it is.
        place: its number in the order of submits (`prefetch`).
        following: the record of the next submit, if that is still there.
    """

    __slots__ = (
        "__weakref__",
        "callbacks",
        "dask_future",
        "following",
        "packed",
        "place",
        "spec",
        "task",
        "task_name",
        "task_run_id",
        "upstreams",
    )

    def __init__(
        self,
        task_run_id: UUID,
        dask_future: Future[Any],
        task_name: str = "",
        task: Task[Any, Any] | None = None,
        upstreams: Sequence[Any] = (),
        spec: TaskSpec | None = None,
    ) -> None:
        self.task_run_id = task_run_id
        self.dask_future = dask_future
        self.task_name = task_name
        self.task = task
        self.upstreams = upstreams
        self.spec = spec
        self.packed: CompactState | None = None
        self.callbacks: tuple[Callable[[], object], ...] = ()
        self.place = 0
        self.following: weakref.ref[Any] | None = None

    @property
    def key(self) -> str:
        """The key of the Dask task."""
        return str(self.dask_future.key)

    def is_pending(self) -> bool:
        """Whether the task run has not ended yet, as far as Dask's scheduler has told."""
        return self.packed is None and self.dask_future.status in PENDING_STATUSES

    def is_on(self, client: Client) -> bool:
        """Whether Dask still has to bring the state, and a task on `client`'s scheduler can depend on it."""
        return (
            self.packed is None
            and self.dask_future is not None
            and self.dask_future.status not in ("error", "cancelled")
            and _same_scheduler(self.dask_future.client, client)
        )

    def let_go(self) -> None:
        """Let go of Dask's future, and of what it took to bring the final state here, which is in hand now."""
        self.upstreams, self.spec, self.callbacks = (), None, ()
        dask_future, packed = self.dask_future, self.packed
        if isinstance(dask_future, CollectedFuture) or packed is None:
            return
        if dask_future.status == "finished":
            # Dask releases it where nobody else holds it, such as a submit that is going on (`UpstreamFutures`).
            self.dask_future = cast(Any, CollectedFuture(self.key, dask_future.client, packed))
        else:
            # It still says what became of the task.
            with suppress(Exception):
                dask_future.release()


def _same_scheduler(one: Client, other: Client) -> bool:
    return one is other or (
        one.scheduler is not None and other.scheduler is not None and one.scheduler.address == other.scheduler.address
    )
