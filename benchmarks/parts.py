"""The real parts that benchmarks run on: a pool and gateway of their own, a Prefect server, a watch on the queue."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from prefect_htcdask.embedded import EmbeddedEndpoint, ensure_running, stop
from prefect_htcdask.embedded.condor_binaries import condor_binaries
from prefect_htcdask.settings import EmbeddedSettings
from tools.prefect_server import PrefectServer, prefect_server

PREFIX = "PREFECT_INTEGRATIONS_HTCDASK_"


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set environment variables while the block lasts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@contextmanager
def pool(**settings: Any) -> Iterator[EmbeddedEndpoint]:
    """An embedded pool and gateway, found by default settings and by HTCondor's own commands while the block lasts."""
    with tempfile.TemporaryDirectory(prefix="htcdask-bench-") as directory:
        embedded = EmbeddedSettings(directory=directory, idle_timeout=300, **settings)
        endpoint = ensure_running(embedded)
        binaries = condor_binaries(lambda _text: None)
        try:
            with environment(
                CONDOR_CONFIG=str(endpoint.condor_config or os.environ.get("CONDOR_CONFIG", "")),
                PATH=f"{binaries.release / 'bin'}:{os.environ['PATH']}",
                **{f"{PREFIX}EMBEDDED_DIRECTORY": directory},
            ):
                yield endpoint
        finally:
            stop(embedded)


@contextmanager
def server(database: str | None = None) -> Iterator[PrefectServer]:
    """A Prefect server, used by this process and those it starts while the block lasts.

    Args:
        database: SQLAlchemy URL of its database; SQLite by default.
    """
    with (
        tempfile.TemporaryDirectory(prefix="htcdask-bench-prefect-") as directory,
        prefect_server(Path(directory), database=database) as running,
        environment(**running.environment),
    ):
        yield running


class QueueWatch:
    """A process of its own that notes when the queue holds a number of jobs: neither side pays for looking.

    Args:
        constraint: the jobs that count.
        count: the number to wait for.
        at_most: wait for at most that many, rather than at least.
        timeout: seconds to watch at most.
    """

    def __init__(self, constraint: str, count: int, *, at_most: bool = False, timeout: float = 300) -> None:
        order = {"constraint": constraint, "count": count, "at_most": at_most, "timeout": timeout}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.queue_watch", json.dumps(order)], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "watching":
            raise RuntimeError("the queue could not be watched")

    def when(self) -> float:
        """Unix time, in seconds, at which the queue held that many.

        Raises:
            RuntimeError: it never did in the time given.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        self._process.wait(10)
        if not line:
            raise RuntimeError("the queue did not come to the number of jobs that was waited for")
        return float(line)
