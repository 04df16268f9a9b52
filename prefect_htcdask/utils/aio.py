"""Calls that block, made from a coroutine; and the interpreter's end, after which no thread can be started."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any


async def in_thread(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call what blocks, off the event loop; at interpreter exit there are no more threads, and blocking is right."""
    try:
        return await asyncio.to_thread(function, *args, **kwargs)
    except RuntimeError as exc:
        if "shutdown" not in str(exc):
            raise
    return function(*args, **kwargs)


def interpreter_ends() -> bool:
    """Whether the main thread has ended, and the interpreter waits for the others.

    Prefect can start none of its services from then on, and logs the traceback of each attempt: "can't register atexit
    after shutdown" (CPython, `threading._shutdown`).
    """
    return bool(getattr(threading, "_SHUTTING_DOWN", False)) or not threading.main_thread().is_alive()
