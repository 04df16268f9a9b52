"""Our policy in the simulation: the adapter to the function that the supervisor calls too."""

from __future__ import annotations

from dataclasses import dataclass, replace

from prefect_htcdask.settings import AdaptiveSettings
from prefect_htcdask.supervisor.policy import RECENT_WAITS, Decision, Demand, PolicySettings, Supply, Target, decide

from .forecast import BUCKET
from .state import GroupState, Orders
from .trace import Group


def default_settings() -> PolicySettings:
    """The policy's settings as the package's own defaults have them."""
    fields = AdaptiveSettings.model_fields
    return PolicySettings(residence=fields["residence"].default, max_idle_jobs=fields["max_idle_jobs"].default)


@dataclass
class Ours:
    """`prefect_htcdask.supervisor.policy.decide`, for one group."""

    settings: PolicySettings

    def look(self, state: GroupState, now: float) -> Orders:
        """Put the group's state into the policy's words, and its decision into the simulation's."""
        decision = self.decide(state, now)
        again = now + BUCKET if state.coming else None
        if state.idle:
            # A residence may run out though nothing happens.
            first = min(job.idle_since for job in state.idle.values()) + self.settings.residence
            again = min(first if first > now else now + 1, again or first + 1)
        return Orders(decision.submit, (*decision.remove_pending, *decision.retire), again)

    def decide(self, state: GroupState, now: float) -> Decision:
        """The decision."""
        kinds = state.kinds.values()
        done = sum(kind.done for kind in kinds)
        task_seconds = sum(kind.seconds for kind in kinds) / done if done else 0.0
        this = now // BUCKET
        demand = Demand(
            queued=len(state.queue),
            in_hand=state.in_hand,
            coming={(bucket - this) * BUCKET: count for bucket, count in state.coming.items()},
            work=sum((kind.queued + len(kind.running)) * (kind.mean if kind.done else task_seconds) for kind in kinds),
            unknown=sum(kind.queued + len(kind.running) for kind in kinds if not kind.done),
            task_seconds=task_seconds,
        )
        supply = Supply(
            pending=tuple(state.pending),
            idle={name: job.idle_since for name, job in state.idle.items()},
            busy=tuple(state.in_hand),
            unstarted=state.unstarted,
            waits=state.waits[-RECENT_WAITS:],
            boot=state.pool.pool.boot if state.waits else Supply.boot,
        )
        return decide(demand, supply, self.settings, now)


def ours(group: Group) -> Ours:
    """Our policy as it comes, from no worker to the group's maximum."""
    return Ours(replace(default_settings(), target=Target(maximum=group.maximum), threads=group.threads))
