"""The keeper's guard: a command that waits for the end of its input, which the keeper holds, and then cleans up.

It is started by::

    python -m prefect_htcdask.embedded.guard DIRECTORY
"""

from __future__ import annotations

import signal
import sys
import time

from prefect_htcdask.embedded.orphans import end_leftovers
from prefect_htcdask.embedded.state import StateDirectory


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    directory = StateDirectory(sys.argv[1])
    sys.stdin.read()
    # The kernel closes a dying process's files a moment before the process is gone.
    deadline = time.monotonic() + 60
    while (state := directory.read()) is not None and state.alive and time.monotonic() < deadline:
        time.sleep(0.02)
    end_leftovers(directory)


if __name__ == "__main__":
    main()
