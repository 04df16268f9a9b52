"""What is waited for, as the last line of a terminal while it is waited for; nothing of it stays."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

from prefect_htcdask.embedded.progress import Fetched


class _OfDownloads(ProgressColumn):
    """A column that only downloads have."""

    def __init__(self, column: ProgressColumn) -> None:
        super().__init__()
        self._column = column

    def render(self, task: Task) -> Text:
        return self._column.render(task) if task.total else Text()  # type: ignore[return-value]


class _Waited(ProgressColumn):
    """The time since the first message."""

    def __init__(self) -> None:
        super().__init__()
        self._began = time.monotonic()

    def render(self, task: Task) -> Text:
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        return Text(f"{minutes}:{seconds:02}", style="cyan")


class ProgressBar:
    """A spinner, a few words, the time; for downloads a bar as well. It is shown while its context lasts.

    Args:
        console: of the terminal. Its theme need not know rich's own styles: that of Prefect's log does not.
        message: the first words.
    """

    def __init__(self, console: Console, message: str) -> None:
        self._bars = Progress(
            SpinnerColumn(style="cyan"),
            TextColumn("{task.description}", markup=False),
            _OfDownloads(BarColumn(bar_width=30, style="dim", complete_style="cyan", finished_style="green")),
            _OfDownloads(DownloadColumn()),
            _Waited(),
            console=console,
            transient=True,
            # What a program prints goes above the line, but where it goes to a file, it still does.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._task = self._bars.add_task(message, total=None)

    def start(self) -> None:
        """Show it.

        Raises:
            rich.errors.LiveError: the terminal shows another one.
        """
        self._bars.start()

    def stop(self) -> None:
        """Take it off the screen."""
        self._bars.stop()

    def __enter__(self) -> ProgressBar:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def take(self, message: str) -> None:
        """Show this message in the place of the one before, from whatever thread."""
        bars = self._bars
        if isinstance(message, Fetched):
            bars.update(self._task, description=message.doing, completed=message.done, total=message.total)
        elif bars.tasks[0].total:
            bars.remove_task(self._task)
            self._task = bars.add_task(message, total=None)
        else:
            bars.update(self._task, description=message)
