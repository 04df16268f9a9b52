"""The upstream futures in the parameters of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from distributed import Client, Future
from prefect.futures import PrefectDistributedFuture, PrefectFuture
from prefect.utilities.annotations import quote
from prefect.utilities.collections import StopVisiting, visit_collection

from prefect_htcdask.runner.client.connection import connection_of
from prefect_htcdask.runner.futures.futures import HTCDaskFuture
from prefect_htcdask.runner.futures.pending_result import PendingResult
from prefect_htcdask.worker.call import Upstream

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

    from prefect_htcdask.runner.client.task_spec import TaskSpec


class UpstreamFutures:
    """Collects the upstream futures of a call, and puts `Upstream` in their places.

    A future whose state this process has already is replaced by the state itself, or by Dask data that stands for it
    (`LargeStates`): it would make Dask run a finished task again, if the worker that held the state is gone. The
    others' results stay on the cluster for as long as this object is held: until the graph that needs them is sent,
    another thread may collect them.

    Args:
        client: sends the call.
        others: upstream futures that the call needs besides; their places are the first.
        upload: makes Dask data of a state in hand, where that is large; else it goes along with the call.

    Attributes:
        results: the records of those that stand in the call as `Upstream`, by its index.
        sources: of each, the task whose state it brings, or only its key.
        brought_back: Dask's futures of states in hand.
    """

    def __init__(
        self,
        client: Client,
        others: UpstreamFutures | None = None,
        upload: Callable[[PendingResult], Future[Any] | None] = lambda _: None,
    ) -> None:
        self._client = client
        self._upload = upload
        self.brought_back: list[Future[Any]] = list(others.brought_back) if others else []
        self.results: list[PendingResult] = list(others.results) if others else []
        self.sources: list[TaskSpec | str] = list(others.sources) if others else []
        self._index: dict[int, int] = {id(result): i for i, result in enumerate(self.results)}
        self._held: list[Any] = []
        self._waits_only = False

    def replace_awaited(self, value: Any) -> Any:
        """As `replace`, for what is only waited for: of a future in hand, the state without the result."""
        self._waits_only = True
        try:
            return self.replace(value)
        finally:
            self._waits_only = False

    def replace(self, value: Any) -> Any:
        """Put `Upstream`, or a state, in the place of each future in `value`."""
        if type(value) in (int, float, str, bool, bytes, type(None)):
            return value
        return visit_collection(value, visit_fn=self._visit, return_data=True, context={})

    def _visit(self, item: Any, context: dict[str, Any]) -> Any:
        if isinstance(context.get("annotation"), quote):
            raise StopVisiting()
        if not isinstance(item, PrefectFuture) or isinstance(item, PrefectDistributedFuture):
            return item
        result = item.pending_result if isinstance(item, HTCDaskFuture) else None
        if result is not None:
            if id(result) in self._index:
                return Upstream(self._index[id(result)])
            dask_future = result.dask_future
            if result.is_on(self._client):
                if dask_future.client is not self._client:
                    # Its task has to be there before those that need it.
                    connection_of(dask_future.client).flush()
                return self._upstream(result, dask_future)
        # In hand already, or another runner's.
        item.wait()
        packed = result.packed if result is not None else None
        if self._waits_only and packed is not None and packed.has_result:
            packed = packed.without_data()
            return packed.state
        if result is not None and packed is not None:
            there = self._upload(result)
            if there is not None:
                self.brought_back.append(there)
                return self._upstream(result, there)
        state: State[Any] = item.state
        return state

    def _upstream(self, result: PendingResult, dask_future: Future[Any]) -> Upstream:
        key = str(dask_future.key)
        spec = result.spec
        self._index[id(result)] = len(self.results)
        self.results.append(result)
        self.sources.append(spec if spec is not None and spec.key == key else key)
        self._held.append(dask_future)
        return Upstream(self._index[id(result)])
