"""Calls that block, made from a coroutine."""

from __future__ import annotations

import asyncio
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
