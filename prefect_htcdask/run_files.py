"""Where the logs and, while it lives, the staged files of a cluster are; and how long they are kept."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from pathlib import Path

import platformdirs

from .settings import HTCDaskSettings

_SURELY_DEAD = 3600.0
"""Seconds without a sign of life; renewals are at most ten minutes apart."""


def run_directory(settings: HTCDaskSettings, name: str) -> Path:
    """The directory of a cluster, or another entry beside it."""
    base = settings.condor.directory
    root = Path(base).expanduser() if base else Path(platformdirs.user_state_dir("prefect-htcdask")) / "runs"
    return root / name


def prune(directory: Path, keep: float, lease: float = 0.0) -> None:
    """Delete what clusters left in `directory` more than `keep` seconds ago, and staged secrets of dead ones sooner.

    A cluster's supervisor touches its directory at each renewal of the lease, so a living one is never old.

    Args:
        directory: the directory of all clusters.
        keep: seconds that logs are kept.
        lease: seconds that a cluster lives without a renewal.
    """
    now = time.time()
    alive = max(_SURELY_DEAD, 2 * lease)
    with suppress(OSError):
        for entry in directory.iterdir():
            with suppress(OSError):
                age = now - entry.stat().st_mtime
                if age > max(keep, alive):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
                elif age > alive and (entry / "staging").is_dir():
                    shutil.rmtree(entry / "staging")
