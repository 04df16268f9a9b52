"""Notices that the flow's process is gone, by a pidfd as well as by the pipe's end.

A forked child of user code can hold the pipe open after its parent died; a pidfd tells the truth. PR_SET_PDEATHSIG is
no help: it fires when the parent's *thread* ends.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable


class ParentWatch:
    """Calls `on_gone` once when the process `pid` has ended.

    Args:
        pid: the flow's process.
        on_gone: called in the event loop.
    """

    def __init__(self, pid: int, on_gone: Callable[[], None]) -> None:
        self._on_gone = on_gone
        self._descriptor: int | None = None
        try:
            self._descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            on_gone()
            return
        except (AttributeError, OSError):
            # An old kernel, or a sandbox that forbids it: the pipe's end still tells.
            return
        asyncio.get_running_loop().add_reader(self._descriptor, self._readable)

    def _readable(self) -> None:
        self.close()
        self._on_gone()

    def close(self) -> None:
        """Stop watching."""
        if self._descriptor is not None:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None
