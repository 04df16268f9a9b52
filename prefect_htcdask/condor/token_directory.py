"""The one token that HTCondor is to offer: it reads tokens from a directory, so this is a private one of its own."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from prefect_htcdask.utils.private_file import write_private

_PREFIX = "htcdask-token-"
_TOKEN = "token"
_YOUNG = 60.0
"""Seconds in which a directory may not be locked yet by the process that made it."""


class TokenDirectory:
    """A directory of mode 0700 with one token of mode 0600, gone after `close`.

    Its maker holds a lock on it while it lives. What one left that was killed, the next removes.

    Args:
        token: the token's text.
    """

    def __init__(self, token: str) -> None:
        remove_abandoned()
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        write_private(self.path / _TOKEN, token if token.endswith("\n") else f"{token}\n")

    def close(self) -> None:
        """Remove the token; idempotent."""
        if self._lock >= 0:
            with suppress(OSError):
                _remove(self._lock, self.path)
            os.close(self._lock)
            self._lock = -1


def remove_abandoned() -> None:
    """Remove the tokens of this user's processes that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            status = path.stat(follow_symlinks=False)
            if status.st_uid != os.getuid() or time.time() - status.st_mtime < _YOUNG:
                continue
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by a maker that lives
                _remove(lock, path)
            finally:
                os.close(lock)


def _remove(directory: int, path: Path) -> None:
    """Delete the token in an open directory, and the directory, unless somebody keeps other files in it."""
    with suppress(FileNotFoundError):
        os.unlink(_TOKEN, dir_fd=directory)
    path.rmdir()
