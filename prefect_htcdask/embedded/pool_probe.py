"""The command that asks the HTCondor pool of CONDOR_CONFIG how it is, and prints the answer as JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from prefect_htcdask.embedded.listeners import PORT_OWNERS, check_pool


def _ask() -> dict[str, Any]:
    """The answer of schedd and collector. Raises LookupError where the pool is not ready."""
    import htcondor2

    htcondor2.reload_config()
    check_pool(htcondor2.param.get(PORT_OWNERS), htcondor2.param.get("COLLECTOR_HOST"))
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
        # $CondorVersion: 23.9.6 2026-07-12 ... $
        "version": str(schedd_ad["CondorVersion"]).split()[1],
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
