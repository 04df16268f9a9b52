"""One benchmark's result, as the one JSON line that it prints."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Result:
    """What a benchmark measured. Figures in SI units.

    Attributes:
        benchmark: its name.
        metrics: our figures.
        peers: the peers' figures, by peer, measured in the same run.
        goal: the bounds, by name.
        checks: for each bound, whether the figures keep it; computed, never written by hand.
    """

    benchmark: str
    metrics: dict[str, Any]
    peers: dict[str, Any] = field(default_factory=dict)
    goal: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, bool] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether all bounds are kept; `None` where there are none: such a benchmark only tells."""
        return all(self.checks.values()) if self.checks else None

    def line(self) -> str:
        """The JSON line."""
        return json.dumps(
            {
                "benchmark": self.benchmark,
                "metrics": self.metrics,
                "peers": self.peers,
                "goal": self.goal,
                "met": self.met,
            }
        )
