"""What a flow's process leaves in the scheduler's task metadata, as its workers fetch it.

From there it reaches workers that join later and survives the loss of any worker. It is no Dask dependency, which would
draw all tasks to the worker that happens to hold it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeAlias, TypeVar

from distributed import get_worker
from distributed.utils import sync

METADATA_ROOT = "prefect_htcdask"
"""Under which the metadata has it all: ``[METADATA_ROOT, live run, name]``."""

MetadataKey: TypeAlias = "tuple[str, ...]"
"""Where something is, below `METADATA_ROOT`."""

T = TypeVar("T")


def fetch(place: MetadataKey) -> bytes:
    """Get what was left at `place`; to be called in the thread of a Dask task.

    Raises:
        HTCDaskError: the scheduler no longer has it, since the flow run is over or the scheduler was restarted.
    """
    worker = get_worker()
    blob = sync(worker.loop, worker.scheduler.get_metadata, keys=[METADATA_ROOT, *place], default=None)
    if blob is None:
        from prefect_htcdask.errors import HTCDaskError

        raise HTCDaskError(
            f"the scheduler has no description {'/'.join(place)} of this task any more: its flow run is over, or the "
            "scheduler was restarted"
        )
    return bytes(blob)


class MetadataCache(Generic[T]):
    """What this worker process has fetched; each once, however many threads ask at the same time.

    The least recently used is dropped, and is fetched again when it is needed; the last one always stays.

    Args:
        make: makes of the bytes what is kept.
        max_entries: how many are kept at most.
        max_bytes: of how many fetched bytes at most.
    """

    def __init__(self, make: Callable[[bytes], T], max_entries: int, max_bytes: int) -> None:
        self._make = make
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[MetadataKey, tuple[T, int]] = OrderedDict()
        self._locks: dict[MetadataKey, threading.Lock] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, place: MetadataKey) -> T:
        """What was made of the bytes at `place`.

        Raises:
            HTCDaskError: the scheduler does not have it.
        """
        with self._lock:
            if place in self._entries:
                self._entries.move_to_end(place)
                return self._entries[place][0]
            lock = self._locks.setdefault(place, threading.Lock())
        try:
            with lock:
                with self._lock:
                    if place in self._entries:
                        return self._entries[place][0]
                blob = fetch(place)
                made = self._make(blob)
                with self._lock:
                    self._keep(place, made, len(blob))
                return made
        finally:
            with self._lock:
                self._locks.pop(place, None)

    def _keep(self, place: MetadataKey, made: T, size: int) -> None:
        self._entries[place] = made, size
        while len(self._entries) > 1 and (
            len(self._entries) > self._max_entries or sum(size for _, size in self._entries.values()) > self._max_bytes
        ):
            self._entries.popitem(last=False)


blobs: MetadataCache[bytes] = MetadataCache(lambda blob: blob, 256, 64 * 1024**2)
"""What stays pickled, since each task run gets a copy of its own."""
