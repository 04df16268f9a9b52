"""A cluster of `maximum` workers, asked for at time zero and kept to the end."""

from __future__ import annotations

from dataclasses import dataclass

from .state import GroupState, Orders
from .trace import Group


@dataclass
class Fixed:
    """As many jobs as there may be, always; the pool starts evicted ones again."""

    workers: int

    def look(self, state: GroupState, now: float) -> Orders:
        """Ask once."""
        return Orders(submit=self.workers - state.total)


def fixed(group: Group) -> Fixed:
    """A fixed cluster of the group's maximum."""
    return Fixed(group.maximum)
