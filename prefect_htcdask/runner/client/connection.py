"""How task runs come to the scheduler: over the flow's own client, or over that of the worker whose task submits."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from distributed import Client, Future
from distributed.utils_comm import retry_operation

from prefect_htcdask.compat.dask import send
from prefect_htcdask.runner.client.client import ReconnectingClient
from prefect_htcdask.runner.client.graph import no_large_graph_warning
from prefect_htcdask.runner.client.task_spec import TaskSpec
from prefect_htcdask.runner.client.uploaded_state import UploadedState


class Connection:
    """That of a worker's own client: what is sent leaves at once, and is lost with the connection.

    Args:
        client: the Dask client.
    """

    def __init__(self, client: Client) -> None:
        self.client = client

    def submit(self, spec: TaskSpec, holds: object) -> Future[Any]:
        """Send one task; returns Dask's future of it.

        Args:
            spec: the task, with the options that it is sent with.
            holds: what must live until it is sent.

        Raises:
            TaskRunLost: the connection was given up.
        """
        return self.send([spec], {})[0]

    def send(self, specs: Sequence[TaskSpec], extra: Mapping[str, Any]) -> list[Future[Any]]:
        """Send a graph with these tasks, of the same options, and nodes in `extra` that they need.

        Returns:
            the futures of all, in order; those of `extra` come last.

        Raises:
            TaskRunLost: the connection was given up.
        """
        graph: dict[str, Any] = dict(extra)
        for spec in specs:
            spec.sent = True
            graph[spec.key] = spec.node()
        keys = [*(spec.key for spec in specs), *extra]
        order = {spec.key: spec.number for spec in specs}
        size = sum(len(node.value) for node in extra.values())
        with self._connected(), no_large_graph_warning(size):
            self._keep(specs)
            # Priority and the like are left to `dask.annotate`.
            return send(self.client, graph, keys, order, specs[0].options.resources)

    def upload(self, state: UploadedState) -> Future[Any]:
        """Send a state that this process holds; returns Dask's future of it.

        Raises:
            TaskRunLost: the connection was given up.
        """
        return state.send(self.client)

    def flush_soon(self, spec: TaskSpec) -> None:
        """Somebody asks for a task: send it, should it wait to be sent with others. Does not block."""

    def flush(self) -> None:
        """Send what waits to be sent with others; does not raise."""

    def resubmitted(self, spec: TaskSpec) -> TaskSpec | None:
        """The task, where it is to be held for as long as it may have to be submitted again."""
        return None

    async def gather(self, futures: Mapping[str, Future[Any]]) -> dict[str, Any]:
        """The results of finished tasks by their keys, as far as they can be had; others are computed again."""
        return cast("dict[str, Any]", await self.client.gather(dict(futures), errors="skip", asynchronous=True))

    def _connected(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _keep(self, specs: Sequence[TaskSpec]) -> None:
        """Hold what it takes to submit these again."""


class FlowConnection(Connection):
    """That of a flow's own client: submits go together, and what a lost connection took is submitted again.

    Args:
        client: the client, whose parts these are: the buffer of submits, and what it would submit again.
    """

    client: ReconnectingClient

    def __init__(self, client: ReconnectingClient) -> None:
        super().__init__(client)

    def submit(self, spec: TaskSpec, holds: object) -> Future[Any]:
        """As `Connection.submit`, soon."""
        return self.client.submit_buffer.add(spec, holds)

    def send(self, specs: Sequence[TaskSpec], extra: Mapping[str, Any]) -> list[Future[Any]]:
        """As `Connection.send`, behind what these depend on."""
        self.client.submit_buffer.flush()
        return super().send(specs, extra)

    def upload(self, state: UploadedState) -> Future[Any]:
        """As `Connection.upload`."""
        with self.client.connected():
            self.client.held_states[state.key] = state
            there = state.send(self.client)
        weakref.finalize(there, self.client.held_states.pop, state.key, None).atexit = False
        return there

    def flush_soon(self, spec: TaskSpec) -> None:
        """As `Connection.flush_soon`."""
        self.client.submit_buffer.flush_soon(spec)

    def flush(self) -> None:
        """As `Connection.flush`."""
        self.client.flush_submits()

    def resubmitted(self, spec: TaskSpec) -> TaskSpec | None:
        """As `Connection.resubmitted`."""
        return spec

    async def gather(self, futures: Mapping[str, Future[Any]]) -> dict[str, Any]:
        """As `Connection.gather`."""
        if futures and not self.client.direct_to_workers:
            # What `Client.gather` asks of the scheduler then, without a coroutine for each future.
            answer = await retry_operation(cast(Any, self.client).scheduler.gather, keys=list(futures))
            if answer["status"] == "OK":
                return cast("dict[str, Any]", answer["data"])
        # It has what cannot be had computed again.
        return await super().gather(futures)

    def _connected(self) -> AbstractContextManager[None]:
        return self.client.connected()

    def _keep(self, specs: Sequence[TaskSpec]) -> None:
        self.client.specs.update((spec.key, spec) for spec in specs)


def connection_of(client: Client) -> Connection:
    """The connection of a client that somebody else made."""
    return FlowConnection(client) if isinstance(client, ReconnectingClient) else Connection(client)
