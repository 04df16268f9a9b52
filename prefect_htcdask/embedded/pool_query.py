"""Ask an HTCondor pool how it is, by a process of its own.

The bindings are never imported in a user's process: they read CONDOR_CONFIG from the environment at import, and hold
the interpreter's lock while a daemon does not answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def is_condor_setting(variable: str) -> bool:
    """Whether an environment variable would change HTCondor's configuration: CONDOR_CONFIG and _CONDOR_ANYTHING."""
    return variable == "CONDOR_CONFIG" or variable.upper().startswith("_CONDOR_")


def query_pool(config: str | None, *, wait: float = 0, timeout: float = 120) -> dict[str, Any] | None:
    """The state of a pool, asked in a process of its own.

    Args:
        config: its configuration file; `None` for the machine's configured pool.
        wait: seconds to wait for it to be ready.
        timeout: seconds to wait for an answer beyond that.

    Returns:
        schedd, schedd_address, collector_address, version, bindings, cpus, memory (MiB), jobs (by status); `None` where
        the pool does not answer.
    """
    environment = dict(os.environ)
    if config is not None:
        environment = {name: value for name, value in environment.items() if not is_condor_setting(name)}
        environment["CONDOR_CONFIG"] = config
    command = [sys.executable, "-m", "prefect_htcdask.embedded.pool_probe", "--wait", str(wait)]
    try:
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=wait + timeout, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return None
    if result.returncode != 0:
        return None
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer
