"""What the doctor runs on workers. It needs the standard library alone: a worker that imports Prefect first is slow."""

from __future__ import annotations

import hashlib
import ssl
import urllib.request
from pathlib import Path


def reach(url: str, certificates: str | None = None, verify: bool = True) -> str | None:
    """`None` where `url` answers, else why not.

    Args:
        url: what to ask for.
        certificates: file of the authorities to trust instead of the system's.
        verify: whether the server has to be known by one of them.
    """
    try:
        context = ssl.create_default_context(cafile=certificates) if url.startswith("https:") else None
        if context is not None and not verify:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with urllib.request.urlopen(url, timeout=15, context=context):
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
