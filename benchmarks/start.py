"""From a flow's first ``submit`` to its first result, nothing provisioned, against DaskTaskRunner on HTCondorCluster.

Each run is a new process, as a scheduled flow run is; the two take turns.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.parts import pool, server
from benchmarks.result import Result

RUNS = 10
AT_MOST_SLOWER = 3.0
FLOW = Path(__file__).with_name("start_flow.py")


def run() -> Result:
    """Measure both, taking turns, on the same pool and Prefect server."""
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    with pool() as endpoint, server():
        for number in range(RUNS):
            for who in times:
                seconds = _first_result(who)
                times[who].append(seconds)
                print(f"run {number + 1} {who} {seconds:.2f} s", file=sys.stderr, flush=True)
        interval = _negotiation_interval(str(endpoint.condor_config))
    ours, peer = statistics.median(times["ours"]), statistics.median(times["peer"])
    return Result(
        "start",
        metrics={
            "runs": RUNS,
            "median_seconds": ours,
            "seconds": times["ours"],
            "seconds_more_than_peer": ours - peer,
            "negotiator_interval_seconds": interval,
        },
        peers={"DaskTaskRunner(HTCondorCluster)": {"median_seconds": peer, "seconds": times["peer"]}},
        goal={"seconds_more_than_peer_at_most": AT_MOST_SLOWER},
        checks={"seconds_more_than_peer": ours - peer <= AT_MOST_SLOWER},
    )


def _first_result(who: str) -> float:
    done = subprocess.run([sys.executable, str(FLOW), who], capture_output=True, text=True, timeout=180, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the flow of {who} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return float(json.loads(done.stdout.strip().splitlines()[-1])["seconds"])


def _negotiation_interval(config: str) -> float:
    import htcondor2

    return float(htcondor2.param.get("NEGOTIATOR_INTERVAL", 60)) if config else 60.0
