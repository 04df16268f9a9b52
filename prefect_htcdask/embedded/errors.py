"""The one error of the embedded pool and gateway."""

from __future__ import annotations


class EmbeddedError(RuntimeError):
    """The embedded pool or gateway cannot be had. The message says what is wrong and what to do."""
