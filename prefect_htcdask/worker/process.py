"""What a worker job's process asks of its kernel, its interpreter and Dask, as one that has many small tasks to do."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

SLICE = 0.05
"""Seconds that a worker asks to run for at a time, where others wait for the core, too."""

TICK = ("20ms", "100ms")
"""How often Dask looks how late its event loop is: by default, and in our workers."""


def be_a_batch_process() -> None:
    """Have the kernel schedule this process, and what it starts, as a batch job: it wakes without interrupting others.

    A Dask worker wakes for every message. Where there are more of them than cores, each then drives another one out of
    the core's caches, and a no-op task run takes an eighth more CPU time. Neither the nice value nor the share of
    the cores is affected. A job that its site has given another policy keeps that.

    It also asks for slices of `SLICE`: where there are more workers than cores, the kernel's own of 1 to 3 ms have each
    find the caches full of another one's data after every task run, for another sixth of CPU time.

    Source: sched(7), "SCHED_BATCH: Scheduling batch processes".
    """
    with suppress(AttributeError, OSError):  # another system than Linux, or one whose sandbox forbids it
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
            _ask_for_slices(SLICE)


_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274, "ppc64le": 355}
"""The system call's number, by machine: glibc has a function of that name since 2.41 only, and Python has none."""

_SCHED_ATTR = struct.Struct("=IIQiIQQQ")
"""`struct sched_attr`: size, policy, flags, nice value, priority, runtime, deadline and period."""


def _ask_for_slices(seconds: float) -> None:
    """Ask the kernel to let this thread, and what it starts, run for that long before another one has its turn.

    Of the cores it gets the same share as before, and a process that wakes with a shorter slice does not wait for its
    end. Kernels before 6.12 take no notice, and so do those that know no such call.

    Source: Linux 6.12, "sched/eevdf: Use sched_attr::sched_runtime to set request/slice suggestion": 0.1 to 100 ms.
    """
    if (number := _SCHED_SETATTR.get(platform.machine())) is None:
        return
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = _SCHED_ATTR.pack(_SCHED_ATTR.size, os.SCHED_BATCH, 0, nice, 0, round(1e9 * seconds), 0, 0)
    ctypes.CDLL(None).syscall(ctypes.c_long(number), ctypes.c_int(0), attributes, ctypes.c_uint(0))


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
