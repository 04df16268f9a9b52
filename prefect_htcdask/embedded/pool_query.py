"""Ask an HTCondor pool how it is: a command of its own, printing JSON.

It is never called in a user's process: the bindings read CONDOR_CONFIG from the environment at import, and hold the
interpreter's lock while a daemon does not answer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any


def is_condor_setting(variable: str) -> bool:
    """Whether an environment variable would change HTCondor's configuration: CONDOR_CONFIG and _CONDOR_ANYTHING."""
    return variable == "CONDOR_CONFIG" or variable.upper().startswith("_CONDOR_")


def query_pool(config: str | None, *, wait: float = 0, timeout: float = 30) -> dict[str, Any] | None:
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
    command = [sys.executable, "-m", __name__, "--wait", str(wait)]
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


def _ask() -> dict[str, Any]:
    import htcondor2

    htcondor2.reload_config()
    collector = htcondor2.Collector()
    schedd_ad = collector.locate(htcondor2.DaemonType.Schedd)
    slots = collector.query(htcondor2.AdType.Startd, projection=["SlotType", "TotalSlotCpus", "TotalSlotMemory"])
    slots = [slot for slot in slots if slot.get("SlotType") != "Dynamic"]
    if not slots:
        raise LookupError("the collector knows no slot")
    schedd = htcondor2.Schedd(schedd_ad)
    summary = schedd.query("false", opts=htcondor2.QueryOpt.SummaryOnly)[0]
    states = {"idle": "AllusersIdle", "running": "AllusersRunning", "held": "AllusersHeld"}
    jobs = {name: int(summary.get(attribute, 0)) for name, attribute in states.items()}
    jobs["total"] = int(summary.get("AllusersJobs", sum(jobs.values())))
    return {
        "schedd": schedd_ad["Name"],
        "schedd_address": schedd_ad["MyAddress"],
        "collector_address": htcondor2.param.get("COLLECTOR_HOST", ""),
        "version": schedd_ad.get("CondorVersion", ""),
        "cpus": sum(int(slot.get("TotalSlotCpus", 0)) for slot in slots),
        "memory": sum(int(slot.get("TotalSlotMemory", 0)) for slot in slots),
        "jobs": jobs,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wait", type=float, default=0, help="seconds to wait for the pool to be ready")
    deadline = time.monotonic() + parser.parse_args().wait
    import htcondor2

    while True:
        try:
            answer = _ask()
        except (htcondor2.HTCondorException, LookupError, OSError) as error:
            if time.monotonic() > deadline:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                return 1
            time.sleep(0.05)
        else:
            print(json.dumps(answer))
            return 0


if __name__ == "__main__":
    sys.exit(main())
