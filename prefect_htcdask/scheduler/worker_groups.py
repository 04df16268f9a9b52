"""Which worker group a task belongs to, by the Dask resources that it asks for and those that each group offers.

Pure, and of the standard library alone: it travels by value to the scheduler with the plugin that counts demand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

OFFERS_METADATA = ("prefect_htcdask", "worker-offers")
"""Where the scheduler's task metadata says what the worker groups of its cluster offer, for those who only have its
address."""

Offers: TypeAlias = "Mapping[str, Mapping[str, float]]"
"""What one worker of each group offers, by the name of the group, the default group first."""

GROUP_RESOURCE = "htcdask-group-"
"""Each of several groups offers a resource of its own under this prefix and its name, as much as it has threads."""


def group_resource(name: str) -> str:
    """The Dask resource that only the workers of the group `name` offer; a task in it asks for 1."""
    return GROUP_RESOURCE + name


def group_for(resources: Mapping[str, float] | None, offers: Mapping[str, Mapping[str, float]]) -> str | None:
    """The first group whose workers can run a task.

    Args:
        resources: what the task asks for, by the resource's name; `None` or empty for a task that asks for nothing.
        offers: what one worker of each group offers, in the order of the groups.

    Returns:
        the first group that offers each resource in at least the amount asked for, so the first of all for a task
        that asks for nothing; `None` where no group does.
    """
    for name, offer in offers.items():
        if not resources or all(offer.get(resource, 0) >= amount for resource, amount in resources.items()):
            return name
    return None
