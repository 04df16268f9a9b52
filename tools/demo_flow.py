"""The demo's flow: runs `flows/dimuon.py` as its user would, and says what it found and where it ran.

It is started by::

    python -m tools.demo_flow PICTURE
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

FLOWS = Path(__file__).resolve().parent.parent / "flows"
EVENTS_PER_TASK = 20
"""So few only because there are 80 events, and the demo is to show several workers."""

console = Console(highlight=False, soft_wrap=True)


def main(picture: str) -> None:
    """Run the flow and print its result."""
    # As `python flows/dimuon.py` has it: the modules beside the flow are found, and travel to the workers.
    sys.path.insert(0, str(FLOWS))
    import dask

    from dimuon import dimuon
    from prefect_htcdask import HTCDaskTaskRunner
    from tools.demo_cluster import DemoCluster

    # The user's configuration files may name a gateway.
    dask.config.set({"gateway.address": None})
    run = dimuon.with_options(task_runner=HTCDaskTaskRunner(cluster_class=DemoCluster))
    found = run(events_per_task=EVENTS_PER_TASK, output=picture)
    console.print()
    show("Events", str(found["events"]))
    show("Muon pairs", f"{found['pairs']} of opposite sign")
    for name, numbers in found["datasets"].items():
        peak = numbers["peak"]
        where = f"{peak['low']:.1f} to {peak['high']:.1f} GeV, with {peak['pairs']} pairs" if peak else "no pair"
        show("Peak", f"{where}: {name}")
    show("Picture", found["picture"])
    for cluster in DemoCluster.made:
        for job in cluster.jobs_that_ran():
            show("HTCondor job", f"{job.job_id} on {job.host}, {job.run_seconds:.0f} s")


def show(name: str, value: str) -> None:
    """One line of the result."""
    console.print(f"[bold]{name:14}[/bold]", end=" ")
    console.print(value, markup=False)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except KeyboardInterrupt:
        sys.exit(130)
