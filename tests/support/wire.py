"""What lies between a flow's process and its scheduler, and can be cut."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any
from urllib.parse import urlparse

import distributed
import pytest

from tests.support.waiting import wait_until

PATIENCE = 90.0
"""Seconds for anything that has to come about; short by far on an idle machine."""


class Wire:
    """Passes connections on to a scheduler, and can be cut: then both ends see theirs closed."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        url = urlparse(scheduler.address)
        self._target = (url.hostname, url.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._whole, self._swallows = True, False
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # flows that mention it travel to workers

    def has(self, future: Any) -> bool:
        """Whether the scheduler knows the task of a future of ours."""
        return future.wrapped_future.key in self.scheduler.tasks

    def cut(self) -> None:
        """Close all connections, and take no new ones until it is mended."""
        self._whole = False
        ends, self._ends = self._ends, []
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    @property
    def swallows(self) -> bool:
        """Whether what is sent does not arrive."""
        return self._swallows

    def swallow(self) -> None:
        """Let nothing more of what is sent arrive, without a word, until it is cut."""
        self._swallows = True

    def mend(self) -> None:
        """Let connections through again."""
        self._whole, self._swallows = True, False

    def close(self) -> None:
        """Take no more connections."""
        self.cut()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if not self._whole:
                    near.close()
                    continue
                far = socket.create_connection(self._target)
                self._ends += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink, sink is far), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, there: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if not (there and self._swallows):
                    sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def dask_pool() -> Iterator[distributed.LocalCluster]:
    """Two workers of one thread, whose own connections to the scheduler nobody touches."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0"
    ) as cluster:
        yield cluster


@pytest.fixture
def wire(dask_pool: distributed.LocalCluster) -> Iterator[Wire]:
    """What lies between the flow's process and the scheduler."""
    with closing(Wire(dask_pool.scheduler)) as made:
        yield made


def nothing_is_kept(scheduler: Any) -> bool:
    """Whether the scheduler stands in for no client that is away; waits for that."""
    clients = scheduler.clients
    return bool(
        wait_until(lambda: not [name for name in clients if "stand-in" in name], PATIENCE, "no stand-in is left")
    )
