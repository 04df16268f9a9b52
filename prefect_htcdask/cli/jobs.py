"""The commands ``jobs``, ``sweep`` and ``doctor``: what flow runs have in the pool, and whether they could."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table

from prefect_htcdask.cli.app import JsonOption, app, clear_errors, errors, output, plain, present
from prefect_htcdask.cli.watch import DEFAULT_INTERVAL, IntervalOption, Look, WatchOption
from prefect_htcdask.gateway.endpoints import resolve_running_endpoints
from prefect_htcdask.gateway.run_directory import run_directory
from prefect_htcdask.settings import load_settings
from prefect_htcdask.supervisor.client import SupervisorError

if TYPE_CHECKING:
    from prefect_htcdask.cleanup.jobs import WorkerJob


@app.command()
def jobs(
    flow_run: Annotated[str | None, typer.Option(help="Only those of the flow run with this id.")] = None,
    logs: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Print the logs of the worker job, or of the flow run, with this id instead."),
    ] = None,
    as_json: JsonOption = False,
    watching: WatchOption = False,
    interval: IntervalOption = DEFAULT_INTERVAL,
) -> None:
    """List your worker jobs in the HTCondor queue, and why those do not run that should.

    The exit status is 0 where all run, or need but time to; with --logs, where there is a log.
    """
    from prefect_htcdask.cleanup.jobs import explained_jobs, failed_jobs

    if logs is not None:
        return print_logs(logs, as_json)
    with clear_errors():
        settings = load_settings()

    def look() -> Look:
        parts = resolve_running_endpoints(settings)
        if parts is not None:
            found = explained_jobs(parts, settings, flow_run)
        else:
            # The pool that was started for it has stopped, and with it the queue; what failed is written down.
            found = failed_jobs(settings, set(), flow_run) if flow_run else []
        return Look(_job_table(found), [job.as_dict() for job in found], all(job.is_well for job in found))

    present(look, SupervisorError, as_json=as_json, watching=watching, interval=interval)


def _job_table(found: list[WorkerJob]) -> RenderableType:
    """The jobs, and a line for each reason why some do not run."""
    from prefect_htcdask.cleanup.jobs import reasons

    if not found:
        return "no worker jobs in the queue"
    table = Table(box=None, pad_edge=False)
    for column in ("job", "state", "flow run", "attempt", "host", "since", "diagnosis"):
        table.add_column(column)
    for job in found:
        when = job.ended or job.started or job.submitted
        since = datetime.fromtimestamp(when).strftime("%Y-%m-%d %H:%M:%S")
        cells = (job.job_id, job.state, job.batch_name, str(job.attempt), job.host, since, job.category)
        table.add_row(*(plain(cell) for cell in cells))
    return Group(table, *(plain(line) for line in reasons(found)))


def print_logs(wanted: str, as_json: bool) -> None:
    """Print the logs of a worker job or of a flow run's."""
    from prefect_htcdask.cleanup.logs import worker_logs

    with clear_errors():
        settings = load_settings()
    found = worker_logs(settings, wanted)
    if as_json:
        print(json.dumps([log.as_dict() for log in found], indent=2))
    for log in found if not as_json else ():
        print(f"==> HTCondor job {log.job_id}: {log.path} <==")
        print("".join(c for c in log.text if c.isprintable() or c in "\n\t"))
    if not found:
        errors.print(
            f"[red]error:[/red] there is no log of {plain(wanted)} in {plain(str(run_directory(settings, '')))}: it "
            "may have written nothing; logs are kept for condor.keep_logs"
        )
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
    from prefect_htcdask.cleanup.sweep import sweep
    from prefect_htcdask.utils.prefect_client import PrefectAPIError

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
    """Try every link from the settings to two test workers and back. The exit status is 0 where all hold.

    What does not hang on a broken link is tried all the same. Nothing is left behind, on Ctrl-C neither.
    """
    from prefect_htcdask.cli.doctor.command import examine

    # At INFO it tells of each connection that closes, with a traceback; what breaks is the doctor's to tell.
    logging.getLogger("distributed.batched").setLevel(logging.WARNING)
    marks = {
        "ok": "[green]ok[/green]       ",
        "broken": "[red]broken[/red]   ",
        "not tried": "[yellow]not tried[/yellow]",
    }
    findings: list[dict[str, Any]] = []
    with (errors if as_json else output).status("") as spinner:
        for finding in examine(trying=lambda name: spinner.update(plain(name))):
            findings.append(asdict(finding))
            if not as_json:
                output.print(
                    f"{marks[finding.status]} {finding.seconds:6.1f} s  {finding.name}: {plain(finding.detail)}"
                )
                if finding.remedy:
                    output.print(f"                   -> {plain(finding.remedy)}")
    if as_json:
        print(json.dumps(findings, indent=2))
    if not all(finding["ok"] for finding in findings):
        raise typer.Exit(1)
