"""What the supervisor is asked for, from what a user asks for: checked, and for one worker group."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

from prefect_htcdask.settings import HTCDaskSettings
from prefect_htcdask.supervisor.protocol import group_of


def worker_count(n: Any) -> int:
    """A number of workers.

    Raises:
        ValueError: it is none.
    """
    try:
        count = -1 if isinstance(n, bool) else operator.index(n)
    except TypeError:
        count = -1
    if count < 0:
        raise ValueError(f"{n!r} is no number of workers; it is a whole number from 0")
    return count


def scale_request(n: Any, group: str | None, groups: Mapping[str, Any]) -> dict[str, Any]:
    """Have `n` workers of a group.

    Args:
        n: how many.
        group: the group's name; `None`: the first of `groups`.
        groups: the groups there are.

    Raises:
        ValueError: `n` is no number of workers, or there is no such group.
    """
    return {"op": "scale", "n": worker_count(n), "group": group_of({"group": group}, groups)}


def hold_request(group: str | None, groups: Mapping[str, Any]) -> dict[str, Any]:
    """Keep as many workers of a group as there are.

    Raises:
        ValueError: there is no such group.
    """
    return {"op": "hold", "group": group_of({"group": group}, groups)}


def is_unbounded(maximum: Any) -> bool:
    """Whether a maximum is none: `None`, as dask_gateway writes it, or infinite, as `distributed.deploy.Adaptive`."""
    return maximum is None or (isinstance(maximum, float) and maximum == math.inf)


def adapt_request(
    minimum: Any, maximum: Any, group: str | None, groups: Mapping[str, Any], settings: HTCDaskSettings
) -> dict[str, Any]:
    """Follow the queue of a group between two numbers of workers; one that is `None` is as in the settings.

    So is a maximum that is infinite, Dask's own default: it asks for no bound, and lifts none.

    Raises:
        ValueError: minimum is above maximum, or negative, or there is no such group.
    """
    name = group_of({"group": group}, groups)
    limits = settings.groups.get(name)
    low = (limits and limits.minimum) or 0 if minimum is None else worker_count(minimum)
    if not is_unbounded(maximum):
        high = worker_count(maximum)
    else:
        high = max((limits and limits.maximum) or settings.adaptive.maximum, low)
    if low > high:
        raise ValueError(f"adapt: minimum = {low} is above maximum = {high}; raise the maximum or lower the minimum")
    return {"op": "adapt", "minimum": low, "maximum": high, "group": name}
