"""The upstream futures in the parameters of a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distributed import Client
from prefect.futures import PrefectDistributedFuture, PrefectFuture
from prefect.utilities.annotations import quote
from prefect.utilities.collections import StopVisiting, visit_collection

from prefect_htcdask.futures import HTCDaskFuture
from prefect_htcdask.outbox import OutboxClient
from prefect_htcdask.worker_runtime import Upstream

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State


class UpstreamFutures:
    """Collects the upstream futures of a call, and puts `Upstream` in their places.

    A future whose state this process has already is replaced by the state itself: it would make Dask run a finished
    task again, if the worker that held the state is gone. The others' results stay on the cluster for as long as this
    object is held: until the graph that needs them is sent, another thread may collect them.
    """

    def __init__(self, client: Client, futures: list[HTCDaskFuture[Any]] | None = None) -> None:
        self._client = client
        self.futures: list[HTCDaskFuture[Any]] = futures or []
        self._index: dict[int, int] = {id(future): i for i, future in enumerate(self.futures)}
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
        if isinstance(item, HTCDaskFuture):
            wrapped = item.wrapped_future
            if item.is_on(self._client):
                if id(item) not in self._index:
                    if wrapped.client is not self._client and isinstance(wrapped.client, OutboxClient):
                        # Its task has to be there before those that need it.
                        wrapped.client.empty_outbox()
                    self._index[id(item)] = len(self.futures)
                    self.futures.append(item)
                    self._held.append(wrapped)
                return Upstream(self._index[id(item)])
        # In hand already, or another runner's: its state, by value.
        item.wait()
        packed = item.packed if isinstance(item, HTCDaskFuture) else None
        if self._waits_only and packed is not None and packed.has_result:
            packed = packed.without_data()
            return packed.state
        state: State[Any] = item.state
        return state
