"""The commands ``jobs``, ``sweep`` and ``doctor``: what flow runs have in the pool, and whether they could."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.table import Table

from prefect_htcdask.cli import app, clear_errors, errors, output, plain
from prefect_htcdask.resolution import resolve_running_parts
from prefect_htcdask.settings import load_settings
from prefect_htcdask.supervisor.handle import SupervisorError

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def jobs(
    flow_run: Annotated[str | None, typer.Option(help="Only those of the flow run with this id.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List your worker jobs in the HTCondor queue. The exit status is 0 where none is held."""
    from prefect_htcdask.worker_jobs import worker_jobs

    with clear_errors(SupervisorError):
        parts = resolve_running_parts(load_settings())
        found = worker_jobs(parts, flow_run) if parts is not None else []
    if as_json:
        print(json.dumps([job.as_dict() for job in found], indent=2))
    elif not found:
        output.print("no worker jobs in the queue")
    else:
        table = Table(box=None, pad_edge=False)
        for column in ("job", "state", "flow run", "attempt", "host", "since", "hold reason"):
            table.add_column(column)
        for job in found:
            since = datetime.fromtimestamp(job.started or job.submitted).strftime("%Y-%m-%d %H:%M:%S")
            cells = (job.job_id, job.state, job.batch_name, str(job.attempt), job.host, since, job.hold_reason)
            table.add_row(*(plain(cell) for cell in cells))
        output.print(table)
    if any(job.state == "held" for job in found):
        raise typer.Exit(1)


@app.command("sweep")
def sweep_command(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be removed; the exit status is 1 where that is any.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove your worker jobs and gateway clusters whose flow run is over, unknown, or superseded by a retry.

    Task runs that such a flow run left unfinished are moved to Crashed. The exit status is 0 where nothing is left.
    """
    from prefect_htcdask.prefect_api import PrefectAPIError
    from prefect_htcdask.sweep import sweep

    with clear_errors(SupervisorError):
        try:
            swept = sweep(load_settings(), dry_run=dry_run)
        except PrefectAPIError as exc:
            errors.print(f"[red]error:[/red] nothing was removed that Prefect had not judged: {plain(str(exc))}")
            raise typer.Exit(1) from exc
    if as_json:
        print(json.dumps(asdict(swept), indent=2))
    else:
        for line in swept.lines():
            output.print(plain(line))
        for problem in swept.problems:
            errors.print(f"[red]error:[/red] {plain(problem)}")
    if not swept.all_is_well:
        raise typer.Exit(1)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Try every link from the settings to a worker, with a test worker. The exit status is 0 where all hold."""
    from prefect_htcdask.doctor import examine

    findings: list[dict[str, Any]] = []
    with clear_errors(SupervisorError):
        settings = load_settings()
        for finding in examine(settings):
            findings.append(asdict(finding))
            if not as_json:
                mark = "[green]ok[/green]    " if finding.ok else "[red]broken[/red]"
                output.print(f"{mark} {finding.seconds:6.1f} s  {finding.name}: {plain(finding.detail)}")
    if as_json:
        print(json.dumps(findings, indent=2))
    if not all(finding["ok"] for finding in findings):
        raise typer.Exit(1)
