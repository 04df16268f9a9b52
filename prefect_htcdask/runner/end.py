"""The end of a flow run, stage by stage: none keeps a later one from being tried."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SLOW = 10.0
"""Seconds that an end takes at most without a word of where they went."""

logger = logging.getLogger("prefect.task_runner.htcdask")


@dataclass(frozen=True)
class Stage:
    """One stage of the end.

    Attributes:
        name: what is done, for the log.
        run: does it.
        limit: seconds that it takes at most; `None`: it has no limit of ours, or none is needed.
        complaint: what to say where it fails; without one, its failure tells a user nothing.
        is_fatal: whether its failure is the flow run's, once the later stages are through.
    """

    name: str
    run: Callable[[], object]
    limit: float | None = None
    complaint: str = ""
    is_fatal: bool = False


def run_stages(stages: Sequence[Stage], log: Callable[[str, str], None]) -> None:
    """Run the stages in their order, each of them whatever became of those before.

    Args:
        stages: what is to be done.
        log: writes to the flow run's log; level and text.

    Raises:
        BaseException: what a fatal stage raised, or what interrupted any of them, such as a second Ctrl-C; the first.
    """
    first: BaseException | None = None
    spent: list[tuple[Stage, float]] = []
    for stage in stages:
        began = time.monotonic()
        try:
            stage.run()
        except Exception as exc:
            if stage.is_fatal:
                first = first or exc
            elif stage.complaint:
                log("warning", f"{stage.complaint}: {exc}")
            else:
                logger.debug("%s failed: %s", stage.name, exc)
        except BaseException as exc:
            first = first or exc
        spent.append((stage, time.monotonic() - began))
    if (total := sum(seconds for _, seconds in spent)) > SLOW:
        where = ", ".join(_words(stage, seconds) for stage, seconds in spent if seconds >= 1)
        log("info", f"The end of the flow run took {total:.0f} s: {where}")
    if first is not None:
        raise first


def _words(stage: Stage, seconds: float) -> str:
    limit = f" (at most {stage.limit:.0f} s)" if stage.limit else ""
    return f"{stage.name} {seconds:.0f} s{limit}"
