"""The command ``prefect-htcdask``. Its exit status is 0 only where all is well."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from prefect_htcdask.cli.progress import shown_progress
from prefect_htcdask.cli.watch import DEFAULT_INTERVAL, IntervalOption, Look, WatchOption, watch
from prefect_htcdask.embedded import EmbeddedError, ensure_running, status, stop
from prefect_htcdask.settings import EmbeddedSettings, SettingsError, load_settings

app = typer.Typer(
    name="prefect-htcdask",
    help="Prefect flows on HTCondor workers behind a Dask Gateway.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
output = Console(soft_wrap=True, highlight=False)
errors = Console(stderr=True, soft_wrap=True, highlight=False)

ALWAYS_EXPECTED: tuple[type[Exception], ...] = (EmbeddedError, SettingsError)
"""Errors that any command may meet, and that are told in one line."""

DirectoryOption = Annotated[
    str | None,
    typer.Option(
        "--directory",
        help="State directory of the embedded pool and gateway, instead of the setting embedded.directory.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def main() -> None:
    """Prefect flows on HTCondor workers behind a Dask Gateway."""


@app.command()
def up(
    directory: DirectoryOption = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait at most.")] = 180,
) -> None:
    """Start a personal HTCondor pool and a Dask Gateway on loopback, where they do not run already.

    A flow does this by itself when no gateway is configured. Where this machine is configured for an HTCondor pool
    whose schedd answers, that pool is used. They stop by themselves after embedded.idle_timeout without jobs
    or clusters.
    """
    settings = _settings(directory)
    with clear_errors(), shown_progress(output, errors) as progress:
        endpoint = ensure_running(settings, timeout=timeout, progress=progress)
    cores = os.cpu_count() or 1
    output.print(f"Dask Gateway   {endpoint.gateway_address}, user {endpoint.username}")
    output.print(f"HTCondor       {endpoint.versions['HTCondor']}")
    if endpoint.condor_config is None:
        output.print("               this machine's own pool")
    else:
        output.print(f"               CONDOR_CONFIG={endpoint.condor_config}")
        report = status(settings)
        if report["pool"] and report["pool"]["cpus"] > cores:
            offered = report["pool"]["cpus"]
            output.print(f"               it offers {offered} cores, where the machine has {cores} (embedded.slots)")
    output.print(f"State and logs {endpoint.directory}")


@app.command()
def down(
    directory: DirectoryOption = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait at most.")] = 30,
) -> None:
    """Stop the embedded pool and gateway, with all their jobs and clusters, and wait until all is gone."""
    settings = _settings(directory)
    with clear_errors():
        was_running = stop(settings, timeout=timeout)
    output.print("stopped" if was_running else "nothing was running")


@app.command("status")
def show_status(
    directory: DirectoryOption = None,
    as_json: JsonOption = False,
    watching: WatchOption = False,
    interval: IntervalOption = DEFAULT_INTERVAL,
) -> None:
    """Say what runs, where, and in which versions. The exit status is 0 where all of it runs and answers."""
    settings = _settings(directory)

    def look() -> Look:
        report = status(settings)
        return Look(_table(report), report, is_well=report["running"])

    present(look, as_json=as_json, watching=watching, interval=interval)


def _settings(directory: str | None) -> EmbeddedSettings:
    with clear_errors():
        # On a command line a path counts from the working directory.
        return load_settings(embedded={"directory": directory and os.path.abspath(directory)}).embedded


def present(
    look: Callable[[], Look], *expected: type[Exception], as_json: bool, watching: bool, interval: float
) -> None:
    """Show what a look finds: as JSON, as text, or live.

    Args:
        look: takes a look.
        expected: errors of a look that are told in one line, beside those that every command may meet.
        as_json: print JSON.
        watching: look again and again, where standard output is a terminal.
        interval: seconds between two such looks.

    Raises:
        typer.Exit: not all is well, or a look failed (1); or the options exclude each other (2).
    """
    if as_json and watching:
        errors.print(
            "[red]error:[/red] --json and --watch exclude each other: --watch is a table for people; a program calls "
            "the command with --json as often as it needs"
        )
        raise typer.Exit(2)
    live = watching and sys.stdout.isatty() and output.is_interactive
    if watching and not live:
        errors.print("--watch: standard output is no terminal, so this is one look")
    with clear_errors(*expected):
        if live:
            is_well = watch(look, interval, (*ALWAYS_EXPECTED, *expected))
        else:
            seen = look()
            is_well = seen.is_well
            if as_json:
                print(json.dumps(seen.data, indent=2))
            else:
                output.print(seen.shown)
    if not is_well:
        raise typer.Exit(1)


@contextmanager
def clear_errors(*expected: type[Exception]) -> Iterator[None]:
    """A context in which an expected error becomes one line on standard error and exit status 1."""
    try:
        yield
    except (*ALWAYS_EXPECTED, *expected) as error:
        errors.print(f"[red]error:[/red] {plain(str(error))}")
        raise typer.Exit(1) from error


def plain(text: str) -> str:
    """Text in which brackets are no markup."""
    return text.replace("[", r"\[")


def _table(report: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    rows: dict[str, object] = {"state": report["phase"], "directory": report["directory"]}
    if report["message"]:
        rows["message"] = report["message"]
    if report["keeper"]:
        rows["keeper"] = f"pid {report['keeper']}"
        rows["processes"] = ", ".join(f"{name} {pid}" for name, pid in report["processes"].items())
    pool, gateway, idle = report["pool"], report["gateway"], report["idle"]
    if report["phase"] == "running":
        rows["HTCondor pool"] = _pool_text(pool) if pool else "does not answer"
        rows["Dask Gateway"] = _gateway_text(gateway) if gateway else "does not answer"
    if idle:
        rows["stops when idle"] = f"in {timedelta(seconds=round(idle['left']))}"
    rows["versions"] = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    for name, value in rows.items():
        table.add_row(name, plain(str(value)))
    return table


def _pool_text(pool: dict[str, Any]) -> str:
    jobs = pool["jobs"]
    whose = pool["condor_config"] or "this machine's own"
    return (
        f"{pool['cpus']} cores, {pool['memory']} MiB; jobs: {jobs['running']} running, {jobs['idle']} idle, "
        f"{jobs['held']} held; schedd {pool['schedd']} at {pool['schedd_address']}; configuration: {whose}"
    )


def _gateway_text(gateway: dict[str, Any]) -> str:
    return f"{gateway['address']}, version {gateway['version']}, {len(gateway['clusters'])} clusters"
