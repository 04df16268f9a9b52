"""What a worker job's process asks of its kernel and its interpreter, as one that has many small tasks to do."""

from __future__ import annotations

import gc
import os
from contextlib import suppress


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
