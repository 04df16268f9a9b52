"""What the doctor runs on workers. It needs the standard library alone: a worker that imports Prefect first is slow."""

from __future__ import annotations

import hashlib
import urllib.request
from pathlib import Path


def reach(url: str) -> str | None:
    """`None` where `url` answers, else why not."""
    try:
        with urllib.request.urlopen(url, timeout=15):
            return None
    except OSError as exc:
        return str(exc)


def digest(data: bytes) -> str:
    """The SHA-256 of some data, to compare what two workers hold."""
    return hashlib.sha256(data).hexdigest()


def read(path: str) -> str:
    """What is in a file, or why it cannot be read."""
    try:
        return Path(path).read_text()
    except OSError as exc:
        return str(exc)
