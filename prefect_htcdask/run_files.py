"""Where the logs and, while it lives, the staged files of a cluster are; and how long they are kept."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from pathlib import Path

import platformdirs

from .settings import HTCDaskSettings


def run_directory(settings: HTCDaskSettings, name: str) -> Path:
    """The directory of a cluster, or another entry beside it."""
    base = settings.condor.directory
    root = Path(base).expanduser() if base else Path(platformdirs.user_state_dir("prefect-htcdask")) / "runs"
    return root / name


def prune(directory: Path, keep: float) -> None:
    """Delete what clusters left in `directory` more than `keep` seconds ago."""
    with suppress(OSError):
        for entry in directory.iterdir():
            with suppress(OSError):
                if entry.stat().st_mtime < time.time() - keep:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
