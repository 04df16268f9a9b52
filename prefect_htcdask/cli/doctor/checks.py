"""The doctor: every link of the chain from the settings to a worker's way to the Prefect API, tried for real."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

OK = "ok"
BROKEN = "broken"
NOT_TRIED = "not tried"


@dataclass(frozen=True)
class Finding:
    """One link of the chain.

    Attributes:
        name: of the link.
        ok: whether it was tried and holds.
        status: "ok", "broken" or "not tried".
        seconds: that it took.
        detail: what was seen, or why it was not tried.
        remedy: what to do; empty where it holds, and where it was not tried because of another link.
    """

    name: str
    ok: bool
    status: str
    seconds: float
    detail: str
    remedy: str = ""


class CheckFailed(Exception):
    """A link does not hold, for a reason that no library tells.

    Args:
        detail: what was seen.
        remedy: what to do, where it is not what the link says.
    """

    def __init__(self, detail: str, remedy: str = "") -> None:
        super().__init__(detail)
        self.remedy = remedy


class CheckSkipped(CheckFailed):
    """A link cannot be tried here, though what it needs holds."""


@dataclass(frozen=True)
class Check:
    """One link to try.

    Attributes:
        name: as people see it.
        attempt: tries it; returns what was seen, or raises whatever tells that it does not hold.
        remedy: what to do where it does not.
        needs: names of earlier links without which it cannot be tried.
    """

    name: str
    attempt: Callable[[], str]
    remedy: str
    needs: tuple[str, ...] = ()


def run_checks(links: Sequence[Check], trying: Callable[[str], None]) -> Iterator[Finding]:
    """Try links in order; those whose needs do not hold are told of, and not tried."""
    holds: set[str] = set()
    for link in links:
        missing = [name for name in link.needs if name not in holds]
        if missing:
            yield Finding(link.name, False, NOT_TRIED, 0.0, f"it needs the link {missing[0]!r}")
            continue
        trying(link.name)
        started = time.monotonic()
        try:
            detail, status, remedy = link.attempt(), OK, ""
            holds.add(link.name)
        except Exception as exc:  # whatever breaks a link is the finding
            detail = str(exc) or type(exc).__name__
            status = NOT_TRIED if isinstance(exc, CheckSkipped) else BROKEN
            remedy = getattr(exc, "remedy", "") or link.remedy
        yield Finding(link.name, status == OK, status, time.monotonic() - started, detail, remedy)
