"""What a gateway's scheduler gets from here is pickled by value: it has none of our modules."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType

import cloudpickle
from distributed import Client
from distributed.diagnostics.plugin import SchedulerPlugin

# Pickling by value is registered for a whole process.
_lock = threading.Lock()


@contextmanager
def pickled_by_value(modules: Iterable[ModuleType]) -> Iterator[None]:
    """Have cloudpickle carry what `modules` define by value while the block lasts."""
    registered = list(modules)
    with _lock:
        for module in registered:
            cloudpickle.register_pickle_by_value(module)
        try:
            yield
        finally:
            for module in registered:
                cloudpickle.unregister_pickle_by_value(module)


def install(client: Client, plugin: SchedulerPlugin) -> None:
    """Register `plugin` with the scheduler of `client`; its class and whatever that uses of its module go along."""
    with pickled_by_value([sys.modules[type(plugin).__module__]]):
        client.register_plugin(plugin)
