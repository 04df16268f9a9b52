"""Sends Dask graphs whose tasks are to run in the order in which they were submitted."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import dask
from dask._expr import LLGExpr
from dask.utils import parse_bytes
from distributed import Client, Future
from distributed.spans import SpanMetadata

TOGETHER = "100 ms"
"""Graphs that come within this time are of one generation for Dask, and their tasks' own order decides; as in
`distributed.Client.submit`."""

_THRESHOLD = "distributed.admin.large-graph-warning-threshold"
_configuring = threading.Lock()


def send(
    client: Client,
    nodes: Mapping[str, Any],
    keys: Iterable[str],
    order: Mapping[str, int],
    resources: Mapping[str, float] | None = None,
) -> list[Future[Any]]:
    """Send a graph without waiting for it. Annotations are left to `dask.annotate`.

    `Client.get` would leave the order to `dask.order`, which puts independent tasks the last first.

    Args:
        client: sends it, with the method that its `submit`, `map` and `get` are made of.
        nodes: the graph, by key.
        keys: what is wanted of it.
        order: numbers by key; the lower runs first. Nodes that have none come before all others of the graph.
        resources: what each task asks Dask for.

    Returns:
        the futures of `keys`, in their order.
    """
    wanted = list(keys)
    first = min((order[key] for key in nodes if key in order), default=0) - 1
    futures: dict[str, Future[Any]] = cast(Any, client)._graph_to_futures(
        # The token spares Dask hashing every argument.
        LLGExpr(dict(nodes), _determ_token=uuid.uuid4().hex),
        wanted,
        span_metadata=SpanMetadata(collections=[{"type": "low-level-graph"}]),
        internal_priority={key: order.get(key, first) for key in nodes},
        fifo_timeout=TOGETHER,
        resources=resources,
    )
    return [futures[key] for key in wanted]


@contextmanager
def no_large_graph_warning(size: int) -> Iterator[None]:
    """Have Dask not warn for `size` bytes of a graph, which are sent once for many tasks, as its warning advises."""
    if not size:
        yield
        return
    # Dask's configuration is that of the process: two threads that raised it at once would leave it raised.
    with _configuring, dask.config.set({_THRESHOLD: parse_bytes(dask.config.get(_THRESHOLD)) + size}):
        yield
