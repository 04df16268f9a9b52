"""What a command waits for: a bar in a terminal, plain lines on standard error elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from prefect_htcdask.embedded.progress import Progress, occasionally
from prefect_htcdask.runner.ui.progress_bar import ProgressBar


@contextmanager
def shown_progress(console: Console, errors: Console) -> Iterator[Progress]:
    """Show what is waited for, while it is.

    Args:
        console: of standard output; it has the bar where it is a terminal, and nothing of it stays.
        errors: of standard error; it has the lines otherwise.

    Yields:
        what takes the messages.
    """
    if not console.is_terminal or not console.is_interactive:
        yield occasionally(lambda message: errors.print(message, markup=False))
        return
    with ProgressBar(Console(highlight=False), "looking for the embedded pool and gateway") as bar:
        yield bar.take
