"""Ends what a keeper that was killed has left behind.

Its own children are known by process id and start time, from the state file. What these started is known by what
HTCondor and the gateway put into the environment of their processes: paths in our state directory.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil

from prefect_htcdask.embedded.state import StateDirectory


def end_leftovers(directory: StateDirectory, timeout: float = 60.0) -> bool:
    """End what is left of a dead keeper's processes.

    Args:
        directory: the keeper's state directory.
        timeout: seconds for HTCondor to end by itself before it is killed.

    Returns:
        whether there was anything. Nothing is done where the keeper is alive.
    """
    state = directory.read()
    if state is None or state.alive:
        return False
    master = state.processes.get("condor")
    children = [process for process in state.processes.values() if process.alive]
    found = bool(children)
    for process in children:
        # For HTCondor that is the fast shutdown: the master ends its daemons and their jobs.
        process.send(signal.SIGQUIT if process == master else signal.SIGTERM)
    deadline = time.monotonic() + timeout
    while master is not None and master.alive and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in children:
        process.send(signal.SIGKILL)
    # What is left now is on its own, such as the schedulers of the gateway's clusters.
    for number, patience in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 60.0)):
        deadline = time.monotonic() + patience
        asked: set[psutil.Process] = set()
        while (left := set(_descendants(directory))) and time.monotonic() < deadline:
            found = True
            for descendant in left - asked:
                with suppress(psutil.NoSuchProcess):
                    descendant.send_signal(number)
            asked |= left
            time.sleep(0.05)
    if state.socket_directory:
        shutil.rmtree(state.socket_directory, ignore_errors=True)
    return found


def _descendants(directory: StateDirectory) -> Iterator[psutil.Process]:
    """HTCondor's daemons and jobs, and the gateway's schedulers, that belong to this state directory."""
    config = str(directory.pool / "condor_config")
    execute, clusters = f"{directory.pool / 'execute'}/", f"{directory.gateway / 'clusters'}/"
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
        except (psutil.Error, OSError):
            continue
        # A daemon has both; a user's own program may be configured for the pool too, but no master started it.
        daemon = environment.get("CONDOR_CONFIG") == config and any(
            name.startswith("_CONDOR_ANCESTOR_") for name in environment
        )
        job = environment.get("_CONDOR_SCRATCH_DIR", "").startswith(execute)
        scheduler = environment.get("DASK_DISTRIBUTED__COMM__TLS__CA_FILE", "").startswith(clusters)
        if daemon or job or scheduler:
            yield process
