"""What a flow run waits for until its first worker is there, as the last line of a terminal, under the log."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from contextlib import suppress
from typing import Any

from prefect.logging.handlers import PrefectConsoleHandler
from rich.console import Console
from rich.errors import LiveError

from prefect_htcdask.runner.ui.progress_bar import ProgressBar

_STATES = {"idle": "idle in HTCondor's queue", "running": "started, the worker connects", "held": "held"}


def log_console() -> Console | None:
    """The console of Prefect's log where that goes to a terminal: what is shown beside it must be shown by it."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, PrefectConsoleHandler):
            console = handler.console
            return console if console.is_terminal and console.is_interactive else None
    return None


class StartConsole:
    """Shows what is waited for until the first worker has joined, or it is clear that none will.

    Args:
        console: of the terminal that shows the flow run's log; `None`: nothing is shown.
    """

    def __init__(self, console: Console | None) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[str, str] = {}
        self._why = ""
        self._bar: ProgressBar | None = None
        if console is None:
            return
        bar = ProgressBar(console, "looking for gateway and pool")
        # Another flow run of this process may be showing its own.
        with suppress(LiveError):
            bar.start()
            self._bar = bar

    def say(self, message: str) -> None:
        """Show these words."""
        with self._lock:
            if self._bar is not None:
                self._bar.take(message)

    def take(self, message: dict[str, Any]) -> None:
        """Take what the cluster's supervisor process says."""
        if self._bar is None:
            return
        kind = message.get("kind")
        if kind == "job":
            if message["what"] == "joined":
                self.close()
                return
            self._jobs[message["job_id"]] = message["state"]
        elif kind == "waiting":
            self._why = str(message.get("summary", ""))
        elif kind in ("failed", "flow_run_ended"):
            self.close()
            return
        else:
            return
        self.say(self.words())

    def words(self) -> str:
        """What is waited for, as far as the supervisor has told."""
        states = Counter(state for state in self._jobs.values() if state in _STATES)
        jobs = ", ".join(f"{states[state]} {words}" for state, words in _STATES.items() if states[state])
        if not jobs:
            return "waiting for the first worker's job"
        why = f" ({self._why})" if self._why and states["idle"] else ""
        return f"waiting for the first worker: {jobs}{why}"

    def close(self) -> None:
        """Take the line off the screen; a second call does nothing."""
        with self._lock:
            bar, self._bar = self._bar, None
            if bar is not None:
                bar.stop()
