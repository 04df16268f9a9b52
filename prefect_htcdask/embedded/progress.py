"""What is told of work that takes long: a few words each, with bytes where they are known."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Progress = Callable[[str], None]
"""Takes a message; one that says how far a download is, is a `Fetched`."""

_LOOK = 0.2  # seconds between two looks at what has arrived


class Fetched(str):
    """A message that says how far a download is.

    Attributes:
        doing: what is fetched.
        done: bytes that have arrived.
        total: bytes that there are.
    """

    doing: str
    done: int
    total: int

    def __new__(cls, doing: str, done: int, total: int) -> Fetched:
        self = super().__new__(cls, f"{doing}: {done / 1e6:.1f} of {total / 1e6:.1f} MB")
        self.doing, self.done, self.total = doing, done, total
        return self


@contextmanager
def telling_of_files(progress: Progress, doing: str, directory: Path, total: int) -> Iterator[None]:
    """Tell how much there is in a directory that a program downloads to, whenever that is more than before.

    Args:
        progress: is told, from a thread.
        doing: what is fetched.
        directory: where it arrives.
        total: its size in bytes.
    """
    over = threading.Event()

    def look() -> None:
        before = -1
        while True:
            ended = over.wait(_LOOK)
            done = min(total, _size(directory))
            if done > before:
                progress(Fetched(doing, done, total))
                before = done
            if ended:
                return

    thread = threading.Thread(target=look, name="htcdask-download", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _size(directory: Path) -> int:
    size = 0
    for path in directory.rglob("*"):
        try:
            size += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # just renamed
            continue
    return size


def occasionally(tell: Progress, pause: float = 10.0) -> Progress:
    """For a log: every message is passed on, but of a download's only one in `pause` seconds, and its end."""
    last = -pause

    def take(message: str) -> None:
        nonlocal last
        now = time.monotonic()
        if isinstance(message, Fetched) and message.done < message.total:
            if now - last < pause:
                return
            last = now
        tell(str(message))

    return take
