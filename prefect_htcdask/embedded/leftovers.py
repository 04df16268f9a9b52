"""Ends what a keeper that was killed has left behind."""

from __future__ import annotations

import shutil
import signal
import time

from prefect_htcdask.embedded.state import State


def end_leftovers(state: State | None, timeout: float = 8.0) -> None:
    """End what a keeper that was killed has left behind: by process id and start time, never by name.

    Args:
        state: what that keeper last wrote.
        timeout: seconds to wait before killing.
    """
    if state is None or state.alive:
        return
    master = state.processes.get("condor")
    if master is not None:
        master.send(signal.SIGQUIT)
    rest = [*(process for name, process in state.processes.items() if name != "condor"), *state.others]
    for process in state.processes.values():
        if process is not master:
            process.send(signal.SIGTERM)
    deadline = time.monotonic() + timeout
    # The master ends its daemons and their jobs; what is left after that is on its own.
    while master is not None and master.alive and time.monotonic() < deadline:
        time.sleep(0.05)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in (*rest, *([master] if master else [])):
            process.send(number)
        deadline = time.monotonic() + 2
        while any(process.alive for process in rest) and time.monotonic() < deadline:
            time.sleep(0.05)
    if state.socket_directory:
        shutil.rmtree(state.socket_directory, ignore_errors=True)
