"""What a worker prints of Prefect's logs, in a process of its own: the same text, without the search for colours."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PRINTING = """
import logging, sys
import prefect.main
from prefect.logging import get_logger
from prefect_htcdask.worker.console import without_highlighting

if "after" in sys.argv:
    without_highlighting()
logger = get_logger("task_runs")
for handler in logging.root.handlers:
    handler.setFormatter(logging.Formatter("%(levelname)s | %(message)s"))
logger.info("Task run 'nothing-1' - Finished in state Completed()")
logger.warning("see https://example.org/a?b=c, [bold]not markup[/bold], :warning:, a\\ttab, %s", "x" * 300)
logger.error("two\\nlines, 'quoted', 12.5 %%, /a/path, \\x1b[31mred\\x1b[0m")
print(*(type(handler.console.highlighter).__name__ for handler in logging.root.handlers))
"""


LOGGING = {"PREFECT_LOGGING_LEVEL": "INFO", "PREFECT_LOGGING_TO_API_ENABLED": "false"}


def printed(*arguments: str, **environment: str) -> tuple[str, str]:
    """What it prints on stderr, and its handlers' highlighters."""
    plain = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "NO_COLOR")}
    done = subprocess.run(
        [sys.executable, "-c", PRINTING, *arguments],
        env={**plain, **LOGGING, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stderr, done.stdout.strip()


@pytest.mark.parametrize("markup", ["false", "true"])
def test_the_text_is_the_same(markup: str) -> None:
    before, highlighter = printed(PREFECT_LOGGING_MARKUP=markup)
    assert highlighter == "PrefectConsoleHighlighter"
    after, highlighter = printed("after", PREFECT_LOGGING_MARKUP=markup)
    assert highlighter == "NullHighlighter"
    assert after == before
    assert "WARNING | see https://example.org/a?b=c" in after and len(after.splitlines()) == 4  # one record has two


def test_colours_that_are_asked_for_stay() -> None:
    before, _ = printed(FORCE_COLOR="1", TERM="xterm-256color")
    after, highlighter = printed("after", FORCE_COLOR="1", TERM="xterm-256color")
    assert highlighter == "PrefectConsoleHighlighter"
    assert after == before
    assert "\x1b[" in after.splitlines()[0]
