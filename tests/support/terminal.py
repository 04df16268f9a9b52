"""Commands as a person runs them: in a terminal, and ended with Ctrl-C."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pexpect

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
UP_A_LINE = "\x1b[1A"
SHOW_CURSOR = "\x1b[?25h"


class Terminal(pexpect.spawn):  # type: ignore[misc]
    """A command of Python's in a terminal of 160 columns."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        super().__init__(
            sys.executable,
            list(arguments),
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "160", "LINES": "40", **environment},
            encoding="utf-8",
            dimensions=(40, 160),
            timeout=60,
        )
        self.logfile_read = io.StringIO()

    @property
    def written(self) -> str:
        """All that the command wrote."""
        text: str = self.logfile_read.getvalue()
        return text

    def shows(self, text: str) -> None:
        """Wait until the command has written `text`; fails after a minute."""
        self.expect_exact(text)

    def press_ctrl_c(self) -> int | None:
        """Press Ctrl-C and wait for the end; returns the exit status, `None` where a signal was the end."""
        self.sendintr()
        return self.end()

    def end(self) -> int | None:
        """Wait for the end; returns the exit status."""
        self.expect(pexpect.EOF)
        self.close()
        return self.exitstatus

    @property
    def text(self) -> str:
        """What was written, without the terminal's control sequences."""
        return _CONTROL.sub("", self.written).replace("\r", "")


@contextmanager
def in_terminal(*arguments: str, **environment: str) -> Iterator[Terminal]:
    """The command ``prefect-htcdask`` in a terminal; ended with the context, if it still runs."""
    with python_in_terminal("-m", "prefect_htcdask.cli", *arguments, **environment) as terminal:
        yield terminal


@contextmanager
def python_in_terminal(*arguments: str, **environment: str) -> Iterator[Terminal]:
    """A Python program in a terminal; ended with the context, if it still runs."""
    terminal = Terminal(*arguments, **environment)
    try:
        yield terminal
    finally:
        terminal.close(force=True)
