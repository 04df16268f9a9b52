"""A task that waits for others gives up its slot on the worker meanwhile, or they might never run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import distributed

from prefect_htcdask.compat.dask import give_back_resources
from prefect_htcdask.scheduler.worker_groups import GROUP_RESOURCE

_seceded = threading.local()


def secede() -> bool:
    """Give the slot of the Dask task that runs in this thread to another; False where none does, or it did already."""
    try:
        worker = distributed.get_worker()
        key = worker.get_current_task()
        if getattr(_seceded, "key", None) == key:
            return False
        worker.loop.add_callback(_leave_group, worker, key)
        distributed.secede()
    except (ValueError, KeyError, AttributeError):
        # Not the thread that runs a task of a worker, so it holds no slot.
        return False
    _seceded.key = key
    return True


def _leave_group(worker: Any, key: Any) -> None:
    """Free a task's place in its worker group; called on the worker's event loop.

    The resource of a group stands for its workers' threads, but Dask lets a task that secedes keep its resources
    (`distributed.worker_state_machine`): tasks that wait for others of their group would keep those out for ever.
    """
    give_back_resources(worker, key, lambda name: name.startswith(GROUP_RESOURCE))


@contextmanager
def seceded(blocks: bool) -> Iterator[None]:
    """While a task waits for others that it has submitted, its slot on the worker is free for those."""
    freed = blocks and secede()
    try:
        yield
    finally:
        if freed:
            distributed.rejoin()
            _seceded.key = None
