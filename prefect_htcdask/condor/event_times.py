"""When things happened to jobs, by this host's clock, whatever the schedd's zone and clock are.

An event log holds the local time of the schedd that writes it.

HTCondor's readers take such a time for one of their own zone (`ULogEvent::readHeader` calls mktime), so that it is off
by whole quarters of an hour where the zones differ, and by an hour after summer time has ended in one of them. Which
quarters these are is seen by when an event can have been written at all: after the last look at the log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefect_htcdask.condor.submit_description import LEASE_ATTRIBUTE

SERVER_TIME = "ServerTime"
"""What the schedd adds to its answer where it is asked for: the time there (`condor_q` counts by it, too)."""

_SCHEDD_TIMES = ("EnteredCurrentStatus", "JobCurrentStartDate", "JobCurrentStartExecutingDate", LEASE_ATTRIBUTE)
"""Attributes of a job ad that have the schedd's time. QDate has that of the host that submits: ours."""

_QUARTER = 900.0
_LENIENCE = 2.0
"""Seconds: the log holds whole ones, and file systems round too."""


class EventTimes:
    """Turns the times of events, as they are read, into Unix times in seconds.

    Args:
        now: the time at which the log is first looked at, by the clock of whoever reads it.
    """

    def __init__(self, now: float) -> None:
        self._shift = 0.0
        self._last_look = now

    def before(self, told: Sequence[float], written: float, now: float) -> list[float]:
        """The times of events that stood in the log before the first look at it.

        Args:
            told: when they happened, as read, in the log's order.
            written: when the log was last written, which is when the last of them happened.
            now: the time.
        """
        self._last_look = now
        if told:
            self._shift = _whole_quarters(min(written, now) - told[-1])
        times: list[float] = []
        latest = now
        for when in reversed(told):
            latest = min(latest, when + self._shift)
            times.append(latest)
        return times[::-1]

    def since(self, told: Sequence[float], now: float) -> list[float]:
        """The times of events that were written since the last look.

        Args:
            told: when they happened, as read, in the log's order.
            now: the time; none of them happened later, nor before the last look.
        """
        earliest, self._last_look = min(self._last_look, now), now
        times = []
        for when in told:
            if not self._fits(when + self._shift, earliest, now):
                shift = _whole_quarters(now - when)
                if self._fits(when + shift, earliest, now):
                    self._shift = shift
            earliest = min(max(when + self._shift, earliest), now)
            times.append(earliest)
        return times

    @staticmethod
    def _fits(when: float, earliest: float, latest: float) -> bool:
        return earliest - _LENIENCE <= when <= latest + _LENIENCE


def _whole_quarters(seconds: float) -> float:
    return _QUARTER * round(seconds / _QUARTER)


def seconds_ahead(there: float, asked: float, answered: float) -> float:
    """Seconds that another host's clock is ahead of ours, at least; negative where it is behind.

    Args:
        there: the time by that clock, in whole seconds, at some time between the question and the answer.
        asked: when the question was asked, by our clock.
        answered: when the answer was there.
    """
    return max(0.0, there - answered) or min(0.0, there + 1 - asked)


def by_our_clock(ad: Mapping[str, Any], ahead: float) -> dict[str, Any]:
    """A job ad with the schedd's times by our clock.

    Args:
        ad: as the schedd gave it.
        ahead: seconds that its clock is ahead of ours.
    """
    return {**ad, **{name: float(ad[name]) - ahead for name in _SCHEDD_TIMES if ahead and ad.get(name)}}
