"""Calls those who asked to be called once a task run has ended."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect_htcdask.futures import HTCDaskFuture

logger = logging.getLogger("prefect.task_runner.htcdask")


def call_all(calls: list[tuple[Callable[[Any], None], Any]]) -> None:
    """Call functions with their futures; what one of them raises goes to the log."""
    for fn, future in calls:
        try:
            fn(future)
        except Exception:
            logger.exception("Error in a done-callback of task run %s", future._task_run_id)


def call_late(futures: list[HTCDaskFuture[Any]]) -> None:
    """Call whoever waits for futures that had finished, and were not here, as their collector closed."""
    for future in futures:
        with suppress(Exception):
            future.wait()
        calls, future._callbacks = future._callbacks, ()
        call_all([(fn, future) for fn in calls])  # which not even the Prefect API knows the end of
