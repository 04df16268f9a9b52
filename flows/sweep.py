"""Removes what flow runs left behind: jobs, gateway clusters and unfinished task runs of those that are over.

The same as the command ``prefect-htcdask sweep``, as a flow for a schedule. It needs no worker of its own: run it on
the submit host, as the user whose flows it looks after.

    python flows/sweep.py --dry-run
"""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from prefect import flow, get_run_logger

from prefect_htcdask import HTCDaskError
from prefect_htcdask.cleanup.sweep import sweep
from prefect_htcdask.embedded.errors import EmbeddedError
from prefect_htcdask.settings import SettingsError, load_settings
from prefect_htcdask.supervisor.client import SupervisorError


@flow(retries=0)
def sweep_leftovers(dry_run: bool = False) -> dict[str, int]:
    """Remove worker jobs and gateway clusters whose flow run is over, and end the task runs that it left unfinished.

    Args:
        dry_run: only log what would be removed.

    Returns:
        how many jobs and clusters were removed, and task runs ended.

    Raises:
        HTCDaskError: not everything could be looked at, or removed; the rest was.
    """
    log = get_run_logger()
    swept = sweep(load_settings(), dry_run=dry_run)
    for line in swept.lines():
        log.info(line)
    if swept.problems:
        raise HTCDaskError("; ".join(swept.problems))
    return {
        "jobs_removed": swept.jobs_removed,
        "clusters_stopped": len(swept.clusters_stopped),
        "task_runs_ended": swept.task_runs_ended,
    }


def main(dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False) -> None:
    """Remove what flow runs that are over have left behind."""
    typer.echo(json.dumps(sweep_leftovers(dry_run=dry_run), indent=2))


if __name__ == "__main__":
    cli = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    cli.command()(main)
    try:
        cli()
    except (HTCDaskError, EmbeddedError, SettingsError, SupervisorError) as exc:
        sys.exit(f"sweep: {exc}")
