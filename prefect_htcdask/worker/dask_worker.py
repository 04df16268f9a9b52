"""A Dask worker whose profiler cannot bring it to a standstill."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distributed import Worker

_COLLECTS_ANYWHERE = sys.version_info < (3, 12)
"""Whether this Python collects garbage as it makes an object, and not only between two instructions."""


class ProfiledWorker(Worker):
    """Looks at the frames of its task threads without a garbage collection in the middle.

    Before Python 3.12, one may begin while `sys._current_frames` holds the interpreter's list of threads. A finalizer
    that gives up the GIL in it lets another thread run, which may start or end a thread: that waits for the list with
    the GIL in its hands, and the process stands still for ever. A worker looks a hundred times a second.

    Source: cpython issue 106883; dask/distributed issue 8616, for which distributed does without its other profiler,
    that of the event loop, with Python 3.11.
    """

    def trigger_profile(self) -> None:
        """See `distributed.Worker.trigger_profile`."""
        with _no_collection():
            super().trigger_profile()

    def get_call_stack(self, keys: Any = None) -> dict[Any, Any]:
        """See `distributed.Worker.get_call_stack`."""
        with _no_collection():
            stacks: dict[Any, Any] = super().get_call_stack(keys)
        return stacks


@contextmanager
def _no_collection() -> Iterator[None]:
    if not (_COLLECTS_ANYWHERE and gc.isenabled()):
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
