"""The option ``--watch``: a command's answer as a live table in a terminal, renewed until Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

LEAST_INTERVAL = 5.0
"""Seconds between two looks at least: each look is a query that a busy schedd has to answer beside its work."""

DEFAULT_INTERVAL = 10.0

INTERRUPTED = 130
"""Exit status where Ctrl-C came before there was anything to judge (128 + SIGINT, as shells have it)."""

WatchOption = Annotated[
    bool, typer.Option("--watch", help="Show it live in the terminal until Ctrl-C; elsewhere it is one look.")
]
IntervalOption = Annotated[
    float,
    typer.Option(
        min=LEAST_INTERVAL,
        help="Seconds between two looks of --watch: each costs the schedd a query.",
        metavar="SECONDS",
    ),
]


@dataclass(frozen=True)
class Look:
    """What a command found: as people see it and as JSON has it, and whether all is well with it."""

    shown: RenderableType
    data: Any
    is_well: bool


def watch(
    look: Callable[[], Look], interval: float, errors: tuple[type[Exception], ...], console: Console | None = None
) -> bool:
    """Show looks in a terminal, one in the place of the other, until Ctrl-C. The last one stays on the screen.

    Where a look fails after the first, the one before stays, and the error with it.

    Args:
        look: takes a look.
        interval: seconds between the end of one and the start of the next.
        errors: what a look fails with, where trying again may help.
        console: of the terminal.

    Returns:
        whether all was well at the last look; one that failed is not.

    Raises:
        typer.Exit: Ctrl-C came before the first look was over.
        Exception: the first look failed.
    """
    console = console or Console(highlight=False)
    try:
        # Not yet inside of Live: an error of the first look is one line, as without --watch.
        with console.status("asking HTCondor"):
            started = time.monotonic()
            last = look()
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    is_well, taken, problem = last.is_well, time.time(), ""
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                # What is slow to answer is asked less often.
                pause = max(interval, time.monotonic() - started)
                live.update(Group(last.shown, _footer(taken, pause, problem)), refresh=True)
                time.sleep(pause)
                started = time.monotonic()
                try:
                    last = look()
                except errors as exc:
                    is_well, problem = False, str(exc)
                else:
                    is_well, taken, problem = last.is_well, time.time(), ""
        except KeyboardInterrupt:
            live.update(last.shown if not problem else Group(last.shown, _problem(problem)), refresh=True)
    return is_well


def _footer(taken: float, pause: float, problem: str) -> RenderableType:
    when = time.strftime("%H:%M:%S", time.localtime(taken))
    line = Text(f"as of {when}; again every {pause:.0f} s; Ctrl-C ends it", style="dim")
    return Group(_problem(problem), line) if problem else line


def _problem(problem: str) -> Text:
    return Text.assemble(("error: ", "red"), problem)
