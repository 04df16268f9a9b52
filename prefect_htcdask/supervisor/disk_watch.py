"""Watches the disk that takes the workers' logs: HTCondor evicts a worker of which it cannot write a line."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from dask.utils import format_bytes

INTERVAL = 10.0
"""Seconds between two looks."""

_MEBIBYTE = 2**20
_SHARE = 0.05
_AGAIN = 2  # times as much as is too little, until there is enough again
_REPEATS = 3  # of the word that all may write again


class DiskWatch:
    """Tells that the disk gets full, once each time, and has the workers write nothing then.

    Args:
        directory: the cluster's run directory.
        condor: calls a function in a thread of its own: a file server may hang.
        quiet: has the workers be quiet, or write again.
        say: sends a message to the flow's process.
    """

    def __init__(
        self,
        directory: Path,
        condor: Callable[..., Awaitable[Any]],
        quiet: Callable[[bool], None],
        say: Callable[[dict[str, Any]], None],
    ) -> None:
        self._directory = directory
        self._condor = condor
        self._quiet = quiet
        self._say = say
        self._look_at = 0.0
        self._low = False
        self._well = _REPEATS

    async def look(self, now: float) -> None:
        """Look at the disk, if it is time to.

        Args:
            now: the time, on the monotonic clock.
        """
        if now < self._look_at:
            return
        self._look_at = now + INTERVAL
        try:
            free, few = await self._condor(free_bytes, self._directory)
        except OSError:
            return  # its directory is gone, of which others tell
        if not self._low and free < few:
            self._tell(
                "error",
                f"only {format_bytes(free)} are free on the disk of {self._directory} (condor.directory): workers "
                "write no logs there until there is room, since HTCondor evicts one whose stderr cannot be written. "
                "Free some space, or set condor.directory to another disk",
            )
            self._low = True
        elif self._low and free > _AGAIN * few:
            self._tell("info", f"there is room again on the disk of {self._directory}: workers write their logs there")
            self._low, self._well = False, 0
        if self._low:
            self._quiet(True)  # those that have come meanwhile, too
        elif self._well < _REPEATS:
            self._well += 1
            self._quiet(False)

    def _tell(self, level: str, text: str) -> None:
        self._say({"kind": "log", "level": level, "text": text})


def free_bytes(directory: Path) -> tuple[int, int]:
    """How many bytes this user may write on a directory's disk, and how many are too few."""
    status = os.statvfs(directory)
    few = max(_MEBIBYTE, min(100 * _MEBIBYTE, round(_SHARE * status.f_blocks * status.f_frsize)))
    return (0 if status.f_files and not status.f_favail else status.f_bavail * status.f_frsize), few
