"""Our policy in the simulation: the adapter to the function that the supervisor calls too."""

from __future__ import annotations

from dataclasses import dataclass, replace

from prefect_htcdask.scaling.policy import Decision, Demand, PolicySettings, Supply, Target, decide
from prefect_htcdask.settings import AdaptiveSettings

from .state import GroupState, Orders
from .trace import Group


def default_settings() -> PolicySettings:
    """The policy's settings as the package's own defaults have them."""
    fields = AdaptiveSettings.model_fields
    return PolicySettings(residence=fields["residence"].default, max_idle_jobs=fields["max_idle_jobs"].default)


@dataclass
class Ours:
    """`prefect_htcdask.scaling.policy.decide`, for one group."""

    settings: PolicySettings

    def look(self, state: GroupState, now: float) -> Orders:
        """Put the group's state into the policy's words, and its decision into the simulation's."""
        decision = self.decide(state, now)
        again = None
        if state.idle:
            # A residence may run out though nothing happens.
            first = min(job.idle_since for job in state.idle.values()) + self.settings.residence
            again = first if first > now else now + 1
        return Orders(decision.submit, (*decision.remove_pending, *decision.retire), again)

    def decide(self, state: GroupState, now: float) -> Decision:
        """The decision."""
        demand = Demand(queued=len(state.queue), in_hand=state.in_hand)
        supply = Supply(
            pending=tuple(state.pending),
            idle={name: job.idle_since for name, job in state.idle.items()},
            busy=tuple(state.in_hand),
            unstarted=state.unstarted,
        )
        return decide(demand, supply, self.settings, now)


def ours(group: Group) -> Ours:
    """Our policy as it comes, from no worker to the group's maximum."""
    return Ours(replace(default_settings(), target=Target(maximum=group.maximum), threads=group.threads))
