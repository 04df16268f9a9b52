"""The collectors of Dask clients that no live run owns, such as a worker's own: one for each client."""

from __future__ import annotations

import threading

from distributed import Client

from prefect_htcdask.collector import Collector

_lock = threading.Lock()
_collectors: dict[str, Collector] = {}


def collector_of(client: Client) -> Collector:
    """This process's collector for a client; those of clients that have closed meanwhile are closed."""
    with _lock:
        for key in [key for key, collector in _collectors.items() if collector.client.status == "closed"]:
            _collectors.pop(key).close()
        collector = _collectors.get(client.id)
        if collector is None:
            collector = _collectors[client.id] = Collector(client)
        return collector
