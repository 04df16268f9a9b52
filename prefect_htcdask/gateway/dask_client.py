"""A Dask client that Ctrl-C may meet while it connects."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from distributed import Client


class InterruptibleClient(Client):
    """A `distributed.Client` that closes itself where its connecting is broken off.

    Dask's own stays half open then, without a name by which its maker could close it, and as it is collected at the end
    of the process it waits a minute for its event loop, which has ended before (distributed, `Client.__del__`).
    """

    def start(self, **kwargs: Any) -> None:
        """Connect, as `distributed.Client.start`."""
        try:
            super().start(**kwargs)
        except BaseException:
            if not self.asynchronous:
                with suppress(Exception):
                    self.close()
            raise
