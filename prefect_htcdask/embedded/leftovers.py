"""Ends what a keeper that was killed has left behind."""

from __future__ import annotations

import os
import shutil
import signal
import time

from prefect_htcdask.embedded.state import State


def end_leftovers(state: State | None, timeout: float = 8.0) -> None:
    """End what is left of a dead keeper's processes: by process id and start time, never by name.

    Args:
        state: what that keeper last wrote.
        timeout: seconds for HTCondor to end by itself before it is killed.
    """
    if state is None or state.alive:
        return
    master = state.processes.get("condor")
    servers = [process for process in state.processes.values() if process != master]
    rest = [process for process in (*servers, *state.others) if process.pid != os.getpid()]
    if master is not None:
        # HTCondor's fast shutdown: the master ends its daemons and their jobs.
        master.send(signal.SIGQUIT)
    for server in servers:
        server.send(signal.SIGTERM)
    deadline = time.monotonic() + timeout
    while master is not None and master.alive and time.monotonic() < deadline:
        time.sleep(0.05)
    if master is not None:
        rest.append(master)
    # What is left now is on its own, such as the schedulers of the gateway's clusters.
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in rest:
            process.send(number)
        deadline = time.monotonic() + 3
        while any(process.alive for process in rest) and time.monotonic() < deadline:
            time.sleep(0.05)
    if state.socket_directory:
        shutil.rmtree(state.socket_directory, ignore_errors=True)
