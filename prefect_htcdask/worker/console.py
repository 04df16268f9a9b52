"""What a worker process prints of Prefect's logs: the same text, without looking for words to colour."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from prefect.logging.handlers import PrefectConsoleHandler
from rich.highlighter import NullHighlighter, RegexHighlighter


def without_highlighting() -> None:
    """Spare this process's console handlers of Prefect their search for what to colour, where no colour is printed.

    Prefect looks for states, URLs and names in each record with a dozen regular expressions, a worker job's stderr is a
    file, and Rich prints no colour there; that search is a twentieth of a no-op task run's CPU time. Handlers that
    print colours (a terminal, `FORCE_COLOR`), or that have a highlighter of another kind, stay as they are.
    """
    for handler in _console_handlers():
        console = handler.console
        if console.color_system is None and isinstance(console.highlighter, RegexHighlighter):
            console.highlighter = NullHighlighter()


def _console_handlers() -> Iterator[PrefectConsoleHandler]:
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):  # not a placeholder
            yield from (each for each in logger.handlers if isinstance(each, PrefectConsoleHandler))
