"""The supervisor's messages to the flow's process: never in the way of the work.

A flow's process that is stopped, or a forked child of user code that holds the pipe's other end without reading it,
must not block the supervisor: messages wait in memory, and are dropped where too many do.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import Any

from prefect_htcdask.supervisor.protocol import to_line

_LIMIT = 2**24


class StdoutWriter:
    """Writes messages to stdout without waiting. `open` it in the event loop before the first message."""

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None

    async def open(self) -> None:
        """Connect to stdout."""
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, sys.stdout.buffer)

    def say(self, message: Mapping[str, Any]) -> None:
        """Send a message; one that nobody reads is dropped in the end."""
        transport = self._transport
        if transport is not None and not transport.is_closing() and transport.get_write_buffer_size() < _LIMIT:
            transport.write(to_line(message))

    async def flush(self, timeout: float = 2.0) -> None:
        """Wait until the messages are on their way, for `timeout` seconds at most."""
        end = asyncio.get_running_loop().time() + timeout
        transport = self._transport
        while transport is not None and not transport.is_closing() and transport.get_write_buffer_size():
            if asyncio.get_running_loop().time() > end:
                return
            await asyncio.sleep(0.02)
