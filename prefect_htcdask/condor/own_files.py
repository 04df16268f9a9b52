"""Deletes the files of a cluster, and nothing else that may lie beside them.

A directory is ours where it belongs to this user and its mark names it. In it only regular files of known names are
deleted, and directories that are empty then; links are not followed, and whatever else is there stays.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

MARK_FILE = ".htcdask"
"""Written into each run directory: names it, and is locked while a supervisor looks after the cluster."""

_MARK_KEY = "run_directory_of_prefect_htcdask"
_MOST_READ = 64 * 1024
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


@dataclass(frozen=True)
class Known:
    """What of a directory's content is ours.

    Attributes:
        files: what the names of our files look like, whole.
        directories: the same for directories, each with what is known in it.
    """

    files: re.Pattern[str]
    directories: tuple[tuple[re.Pattern[str], Known], ...] = field(default=())


def mark(directory: Path) -> None:
    """Write down that a directory is the run directory of a cluster."""
    with suppress(FileExistsError):
        descriptor = os.open(directory / MARK_FILE, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            json.dump({_MARK_KEY: directory.name}, stream)


def hold(directory: Path) -> int | None:
    """Show that a cluster lives, whatever the clocks say; returns the descriptor that does as long as it is open.

    Supervisors share the lock, since one may take over from another that just ends. On a file system without locks
    (`None`) the cluster's age alone tells.
    """
    try:
        descriptor = os.open(directory / MARK_FILE, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def clock_of(directory: Path) -> float:
    """Now, by the clock that stamps the files of a directory: a file server's is not this host's.

    Raises:
        OSError: no file can be made there.
    """
    with tempfile.TemporaryFile(dir=directory) as probe:
        return os.fstat(probe.fileno()).st_mtime


class OwnDirectory:
    """A directory of this user's, held open, so that nobody can put another one in its place meanwhile.

    Args:
        descriptor: of the open directory; `opened` makes one.
        name: its name.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self._name = name
        self._lock: int | None = None

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[OwnDirectory]:
        """Open a directory.

        Raises:
            OSError: it is none, or a link, or belongs to somebody else.
        """
        descriptor = os.open(path, _OPEN_DIRECTORY)
        try:
            if os.fstat(descriptor).st_uid != os.geteuid():
                raise PermissionError(f"{path} belongs to somebody else")
            own = cls(descriptor, path.name)
            try:
                yield own
            finally:
                if own._lock is not None:
                    os.close(own._lock)
        finally:
            os.close(descriptor)

    def text(self, name: str) -> str:
        """What a small file of ours in it says; empty where there is none."""
        with suppress(OSError, ValueError):
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self._descriptor)
            with os.fdopen(descriptor, "rb") as stream:
                if stat.S_ISREG(os.fstat(descriptor).st_mode):
                    return stream.read(_MOST_READ).decode()
        return ""

    def is_marked(self) -> bool:
        """Whether its mark names it: a copy under another name is the user's own."""
        try:
            told = json.loads(self.text(MARK_FILE))
        except ValueError:
            return False
        return isinstance(told, dict) and told.get(_MARK_KEY) == self._name

    def is_held(self) -> bool:
        """Whether a supervisor looks after the cluster now; none begins to while this directory is open."""
        try:
            self._lock = os.open(MARK_FILE, os.O_RDWR | os.O_NOFOLLOW, dir_fd=self._descriptor)
        except OSError:
            return False
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False  # a file system without locks
        return False

    def newest(self) -> float:
        """When the last of all that is in it was written, whoever wrote it (Unix time by the file system's clock)."""
        return max(_times(self._descriptor))

    def remove(self, known: Known) -> bool:
        """Delete what is known; returns whether nothing is left."""
        return _remove(self._descriptor, known)

    def remove_below(self, name: str, known: Known) -> None:
        """Delete what is known in a directory below this one, and then that directory, if it is empty."""
        _remove_directory(self._descriptor, name, known)


def _times(descriptor: int) -> Iterator[float]:
    yield os.fstat(descriptor).st_mtime
    with os.scandir(descriptor) as entries:
        for entry in entries:
            with suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    below = os.open(entry.name, _OPEN_DIRECTORY, dir_fd=descriptor)
                    try:
                        yield from _times(below)
                    finally:
                        os.close(below)
                else:
                    yield entry.stat(follow_symlinks=False).st_mtime


def _remove(descriptor: int, known: Known) -> bool:
    """Delete what is known in an open directory, directories first: secrets are in them."""
    names = sorted(os.listdir(descriptor))
    for pattern, below in known.directories:
        for name in names:
            if pattern.fullmatch(name):
                _remove_directory(descriptor, name, below)
    for name in names:
        # The mark goes last: without it, nothing of the rest would be ours.
        if name != MARK_FILE and known.files.fullmatch(name):
            _remove_file(descriptor, name)
    if os.listdir(descriptor) == [MARK_FILE] and known.files.fullmatch(MARK_FILE):
        _remove_file(descriptor, MARK_FILE)
    return not os.listdir(descriptor)


def _remove_file(descriptor: int, name: str) -> None:
    with suppress(OSError):
        # Whose it is does not matter: a pool that root uses writes the workers' files as its own user.
        if stat.S_ISREG(os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=descriptor)


def _remove_directory(descriptor: int, name: str, known: Known) -> None:
    with suppress(OSError):
        below = os.open(name, _OPEN_DIRECTORY, dir_fd=descriptor)
        try:
            if os.fstat(below).st_uid != os.geteuid():
                return
            empty = _remove(below, known)
        finally:
            os.close(below)
        if empty:
            os.rmdir(name, dir_fd=descriptor)
