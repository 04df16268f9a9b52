"""Hears of the end of Dask's futures, many at a time, without a waiting coroutine for each.

`distributed.Future.add_done_callback` starts a coroutine and hands each call to another thread; a map of 50,000 tasks
has 50,000 of these at once. Here the event that Dask sets at a future's end makes the call itself, in the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from distributed import Future


class CallbackEvent:
    """In the place of the `asyncio.Event` of Dask's `FutureState`; rings once, as it is set.

    Args:
        ring: called in the event loop.
    """

    __slots__ = ("_event", "_is_set", "_ring")

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring: Callable[[], None] | None = ring
        self._is_set = False
        # Of those who wait as Dask does; hardly ever there, and larger than the rest.
        self._event: asyncio.Event | None = None

    def is_set(self) -> bool:
        """As `asyncio.Event.is_set`."""
        return self._is_set

    def set(self) -> None:
        """As `asyncio.Event.set`."""
        self._is_set = True
        if self._event is not None:
            self._event.set()
        ring, self._ring = self._ring, None
        if ring is not None:
            ring()

    def clear(self) -> None:
        """As `asyncio.Event.clear`."""
        self._is_set = False
        if self._event is not None:
            self._event.clear()

    async def wait(self) -> bool:
        """As `asyncio.Event.wait`."""
        if self._is_set:
            return True
        if self._event is None:
            self._event = asyncio.Event()
        return await self._event.wait()


def on_end(future: Future[Any], call: Callable[[], None]) -> None:
    """Have `call` called in the event loop once a future is not pending any more; at once if it is not.

    To be called in the event loop of the future's client.

    Args:
        future: of any status.
        call: does not block, and does not raise.
    """
    if future.status != "pending":
        call()
        return
    state = cast(Any, future)._state
    if getattr(state, "_event", state) is None:
        state._event = CallbackEvent(call)
    else:
        # Somebody waits for it already, or another release of Dask keeps its event elsewhere.
        future.add_done_callback(lambda _: call())
