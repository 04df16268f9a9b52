"""What a worker job's process asks of its kernel, its interpreter and Dask, as one that has many small tasks to do."""

from __future__ import annotations

import gc
import os
from contextlib import suppress

TICK = ("20ms", "100ms")
"""How often Dask looks how late its event loop is: by default, and in our workers."""


def be_a_batch_process() -> None:
    """Have the kernel schedule this process, and what it starts, as a batch job: it wakes without interrupting others.

    A Dask worker wakes for every message. Where there are more of them than cores, each then drives another one out of
    the core's caches, and a no-op task run takes an eighth more CPU time. Neither the nice value nor the share of
    the cores is affected. A job that its site has given another policy keeps that.

    Source: sched(7), "SCHED_BATCH: Scheduling batch processes".
    """
    with suppress(AttributeError, OSError):  # another system than Linux, or one whose sandbox forbids it
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


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
