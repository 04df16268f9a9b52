"""libfaketime, for daemons whose clock is to be wrong: the machine's own, or Debian's package in the cache."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import platformdirs
from filelock import FileLock

from tools.bootstrap import download_deb

PACKAGE = "libfaketime"


def library() -> Path:
    """The library to preload (faketime(1)); fetched if needed, some 50 kB.

    Raises:
        tools.bootstrap.BootstrapError: the machine lacks it, and it cannot be had.
    """
    cache = platformdirs.user_cache_path("prefect-htcdask")
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{PACKAGE}.lock"):
        for root in (Path("/"), cache / PACKAGE):
            for found in (root / "usr/lib").glob("*/faketime/libfaketime.so.1"):
                return found
        with tempfile.TemporaryDirectory(prefix=f".{PACKAGE}-", dir=cache) as scratch:
            package = download_deb(PACKAGE, scratch)
            subprocess.run(["dpkg-deb", "-x", package, cache / PACKAGE], check=True)
        return next((cache / PACKAGE / "usr/lib").glob("*/faketime/libfaketime.so.1"))


def environment(ahead: float) -> dict[str, str]:
    """Environment of a program whose clock shall be `ahead` seconds ahead of the machine's, or behind it.

    Only the time of day is wrong, as on a host without NTP: timers and files have the right one.
    """
    return {
        "LD_PRELOAD": os.fspath(library()),
        "FAKETIME": f"{ahead:+.0f}",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }
