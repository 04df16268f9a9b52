"""Stops the functions of a cancelled flow run on a worker that lives on, such as one of a warm pool.

Dask cannot stop what runs in a thread. Python can raise an exception there, as soon as the thread executes Python code
again: a long call into C, `time.sleep` included, ends first. Prefect's own timeouts work in the same way.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_running: dict[int, str] = {}
_interrupted: set[int] = set()
"""Threads that were interrupted in what they run now."""


@contextmanager
def interruptible(run_key: str) -> Iterator[None]:
    """While this thread is in it, `interrupt` with the same live run's id raises `asyncio.CancelledError` here."""
    thread = threading.get_ident()
    with _lock:
        _running[thread] = run_key
    try:
        yield
    finally:
        with _lock:
            _running.pop(thread, None)
            was_interrupted = thread in _interrupted
            _interrupted.discard(thread)
        if was_interrupted:
            # One that is still on its way would hit whatever the thread does next. Not after every task run: with the
            # GIL in hand, the call waits for the interpreter's list of threads (see `worker_profile`).
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)


def interrupt(run_key: str) -> int:
    """Interrupt the functions of a live run in this process, and return how many; for `Client.run`."""
    with _lock:
        threads = [thread for thread, running in _running.items() if running == run_key]
        _interrupted.update(threads)
        for thread in threads:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(asyncio.CancelledError))
    return len(threads)
