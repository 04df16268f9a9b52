"""Sends Dask graphs whose tasks are to run in the order in which they were submitted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import dask
from dask.utils import parse_bytes

_THRESHOLD = "distributed.admin.large-graph-warning-threshold"
_configuring = threading.Lock()


@contextmanager
def no_large_graph_warning(size: int) -> Iterator[None]:
    """Have Dask not warn for `size` bytes of a graph, which are sent once for many tasks, as its warning advises."""
    if not size:
        yield
        return
    # Dask's configuration is that of the process: two threads that raised it at once would leave it raised.
    with _configuring, dask.config.set({_THRESHOLD: parse_bytes(dask.config.get(_THRESHOLD)) + size}):
        yield
