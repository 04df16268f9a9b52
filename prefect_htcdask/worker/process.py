"""What a worker job's process asks of its interpreter and of Dask, as one that has many small tasks to do."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

TICK = ("20ms", "100ms")
"""How often Dask looks how late its event loop is: by default, and in our workers."""


def log_without_colours() -> None:
    """Have Prefect not look for words to colour in what this process logs, which goes to a file.

    For each record, it would try a dozen regular expressions, a twentieth of a no-op task run's CPU time. A flow whose
    own `PREFECT_LOGGING_COLORS` is set has it on its workers too. Called before Prefect is imported.

    Source: prefect.logging.handlers, `PrefectConsoleHandler`.
    """
    os.environ.setdefault("PREFECT_LOGGING_COLORS", "false")


def collect_seldom() -> None:
    """Collect garbage as seldom as `dask worker` does: three times the interpreter's thresholds.

    Source: distributed.cli.dask_worker, which the start script of a job does not run.
    """
    gc.set_threshold(*(3 * count for count in gc.get_threshold()))


def tick_seldom() -> None:
    """Have Dask look ten times a second, not fifty, how late a worker's event loop is: each time, that has to wake.

    What it finds are the times on the dashboard's "Event loop" and a warning of 3 s without a look. An interval that
    the site or the user has set stays.

    Source: distributed.yaml, "distributed.admin.tick".
    """
    import dask

    usual, ours = TICK
    if dask.config.get("distributed.admin.tick.interval", usual) == usual:
        dask.config.set({"distributed.admin.tick.interval": ours})


def count_own_memory(worker: Any) -> None:
    """Have Dask count the memory that its worker uses, without the pages of files that are mapped.

    Those are the kernel's cache, and go where memory is short. Dask takes them for the worker's own, spills, and at
    80 % of the limit starts no task any more for as long as a task has a large file mapped.

    Args:
        worker: a `distributed.Worker`.
    """
    usual = worker.monitor.get_process_memory

    def own_memory() -> int:
        try:
            lines = Path("/proc/self/status").read_text(errors="replace").splitlines()
        except OSError:
            return int(usual())
        sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:"))]
        return sum(sizes) if sizes else int(usual())

    worker.monitor.get_process_memory = own_memory
