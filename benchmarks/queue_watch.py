"""Prints the Unix time at which the queue first holds a number of jobs: ``python -m benchmarks.queue_watch ORDER``."""

from __future__ import annotations

import json
import sys
import time

import htcondor2


def main() -> int:
    """Watch as ordered. Returns 1 where the time ran out."""
    order = json.loads(sys.argv[1])
    schedd = htcondor2.Schedd()
    deadline = time.monotonic() + order["timeout"]
    print("watching", flush=True)
    while time.monotonic() < deadline:
        count = len(schedd.query(order["constraint"], ["ClusterId"]))
        now = time.time()
        if count <= order["count"] if order["at_most"] else count >= order["count"]:
            print(now, flush=True)
            return 0
        time.sleep(0.05)
    return 1


if __name__ == "__main__":
    sys.exit(main())
