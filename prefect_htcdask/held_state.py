"""A final state that stands at the scheduler as Dask data, and can be sent there again."""

from __future__ import annotations

import contextvars
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dask.base import annotate
from distributed import Client, Future
from distributed.protocol.pickle import dumps

from prefect_htcdask.graph_sending import send
from prefect_htcdask.resubmission import loads_node

if TYPE_CHECKING:
    from prefect_htcdask.packed_states import PackedState

URGENT = 1_000_000
"""Priority for Dask: it takes a moment, and whatever needs it has a priority of its own."""


@dataclass(frozen=True)
class HeldState:
    """What it takes to send it.

    Attributes:
        key: of the Dask task whose value it is.
        packed: the state.
        resources: what that task asks Dask for.
    """

    key: str
    packed: PackedState
    resources: Mapping[str, float] | None

    def send(self, client: Client, blob: bytes | None = None) -> Future[Any]:
        """Send it on its own; returns Dask's future of it.

        Args:
            client: sends it.
            blob: the state, where that is pickled already.
        """
        nodes = {self.key: loads_node(self.key, blob if blob is not None else dumps(self.packed.state))}
        # Without the annotations of the task that needs it, such as the worker that it is for.
        return contextvars.Context().run(self._send, client, nodes)

    def _send(self, client: Client, nodes: Mapping[str, Any]) -> Future[Any]:
        with annotate(priority=URGENT):
            return send(client, nodes, nodes, {}, self.resources)[0]
