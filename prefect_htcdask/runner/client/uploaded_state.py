"""A final state that stands at the scheduler as Dask data, and can be sent there again."""

from __future__ import annotations

import contextvars
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dask.base import annotate
from distributed import Client, Future

from prefect_htcdask.compat.dask import send
from prefect_htcdask.runner.client.graph import no_large_graph_warning
from prefect_htcdask.runner.client.task_spec import loads_node

URGENT = 1_000_000
"""Priority for Dask: it takes a moment, and whatever needs it has a priority of its own."""


@dataclass(frozen=True)
class UploadedState:
    """What it takes to send it.

    Attributes:
        key: of the Dask task whose value it is.
        blob: the state, pickled: the user may change the result that it came from.
        resources: what that task asks Dask for.
    """

    key: str
    blob: bytes
    resources: Mapping[str, float] | None

    def send(self, client: Client) -> Future[Any]:
        """Send it on its own, on a connection that is there; returns Dask's future of it."""
        # Without the annotations of the task that needs it, such as the worker that it is for.
        return contextvars.Context().run(self._send, client)

    def _send(self, client: Client) -> Future[Any]:
        nodes = {self.key: loads_node(self.key, self.blob)}
        with no_large_graph_warning(len(self.blob)), annotate(priority=URGENT):
            return send(client, nodes, nodes, {}, self.resources)[0]
