"""Why idle jobs do not start: from a match analysis, and what the negotiator says, to a `Diagnosis`.

Pure, as `diagnosis`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from prefect_htcdask.condor.diagnosis import Category, Diagnosis
from prefect_htcdask.condor.match_analysis import Condition, MatchAnalysis
from prefect_htcdask.condor.submit_description import KIB, MIB

_RESOURCE = re.compile(r"\bRequest(Cpus|Memory|Disk|GPUs)\b", re.IGNORECASE)
_SHOWN = 3
"""Conditions that are named, of those that exclude slots."""


@dataclass(frozen=True)
class Request:
    """What one worker asks for; memory and disk in bytes."""

    cpus: int = 1
    memory: int = 0
    disk: int = 0
    gpus: int = 0

    @classmethod
    def of(cls, ad: Mapping[str, object]) -> Request:
        """From the evaluated attributes of a job ad."""
        cpus, memory, disk, gpus = (
            int(value) if isinstance(value := ad.get(f"Request{name}"), (int, float)) else 0
            for name in ("Cpus", "Memory", "Disk", "GPUs")
        )
        return cls(cpus=cpus, memory=memory * MIB, disk=disk * KIB, gpus=gpus)

    def words(self, resource: str) -> str:
        """What is asked for of a resource."""
        return {
            "cpus": f"{self.cpus} cpu{'s'[: self.cpus != 1]}",
            "memory": f"{size(self.memory)} of memory",
            "disk": f"{size(self.disk)} of disk",
            "gpus": f"{self.gpus} GPU{'s'[: self.gpus != 1]}",
        }[resource]


@dataclass(frozen=True)
class Share:
    """This user's place among those who use the pool, from its accounting.

    Attributes:
        priority: the user's effective priority; the lower, the sooner the negotiator serves them.
        used: slots that the user's jobs have now, by weight.
        ahead: other users of the pool with a better priority.
        used_ahead: slots that those have.
    """

    priority: float
    used: float = 0.0
    ahead: int = 0
    used_ahead: float = 0.0


def diagnose_idle(
    analysis: MatchAnalysis,
    request: Request,
    *,
    waiting: int,
    settings: str = "worker",
    share: Share | None = None,
    rejected: str = "",
) -> Diagnosis:
    """Why idle jobs do not start.

    Args:
        analysis: the pool's slots against one of them.
        request: what it asks for.
        waiting: how many there are.
        settings: where these workers' settings are.
        share: the user's place in the pool, where it is known.
        rejected: the negotiator's last word on them (LastRejMatchReason), if it has said any.
    """
    jobs = f"{waiting:,} worker job{'s' if waiting != 1 else ''} wait{'s' if waiting == 1 else ''}"
    limit = "limit" in rejected.lower()
    if not analysis.slots:
        return Diagnosis(Category.POOL_EMPTY, f"{jobs}: the pool has no slot at all", "is a startd running there?")
    if not analysis.fitting:
        return _excluded(analysis, request, jobs, settings)
    if analysis.refusing == analysis.fitting:
        return Diagnosis(
            Category.SLOTS_REFUSE,
            f"{jobs}: {analysis.fitting:,} of {analysis.slots:,} slots meet what they ask for, but none takes them: "
            "the policy of the site's machines (START) is against it",
            f"ask the site what a job needs there: {settings}.accounting_group, or an attribute by "
            f"{settings}.extra_submit",
        )
    if limit and (analysis.free or "concurrency" in rejected.lower()):
        return Diagnosis(
            Category.LIMIT_REACHED,
            f"{jobs}: the negotiator says: {rejected.strip()}{_place(share)}",
            f"wait, or use another accounting group ({settings}.accounting_group); the site sets such limits",
        )
    if not analysis.free:
        return _full(analysis, request, jobs, settings, share, limit)
    said = f" (its last word: {rejected.strip()})" if rejected.strip() else ""
    room = "1 slot has" if analysis.free == 1 else f"{analysis.free:,} slots have"
    return Diagnosis(
        Category.WAITING,
        f"{jobs}: {room} room for them, and the negotiator has not matched them yet{said}{_place(share)}",
        f"its next cycle may; else your priority or {settings}.accounting_group may stand in the way",
    )


def _full(
    analysis: MatchAnalysis, request: Request, jobs: str, settings: str, share: Share | None, limit: bool
) -> Diagnosis:
    total = analysis.claimed + analysis.open
    full = f"{jobs}: the pool is full: {analysis.claimed:,} of {total:,} slots claimed"
    if analysis.open:
        others = "the other one has" if analysis.open == 1 else f"the {analysis.open:,} others have"
        asked = ", ".join(request.words(name) for name in ("cpus", "memory", "gpus") if getattr(request, name))
        full += f", and {others} no room for {asked}"
    remedy = f"wait, ask for less, or raise {settings}.start_timeout"
    if share is not None and (share.ahead or limit):
        return Diagnosis(
            Category.LOW_PRIORITY,
            f"{full}; your priority: {_place(share).removeprefix('; ')}",
            f"{remedy}; an accounting group of your own may have a better place ({settings}.accounting_group)",
        )
    return Diagnosis(Category.POOL_FULL, full + _place(share), remedy)


def _place(share: Share | None) -> str:
    """A user's place in the pool, in words to append."""
    if share is None:
        return ""
    text = f"; you use {share.used:,.0f} of the pool's slots at priority {share.priority:,.0f}"
    if not share.ahead:
        return text
    users = "1 user with a better one uses" if share.ahead == 1 else f"{share.ahead:,} users with a better one use"
    return f"{text}, {users} {share.used_ahead:,.0f}"


def _excluded(analysis: MatchAnalysis, request: Request, jobs: str, settings: str) -> Diagnosis:
    """No slot meets the job's conditions: which is it?"""
    total = f"{analysis.slots:,} slots"
    fatal = [condition for condition in analysis.conditions if condition.excluded == analysis.slots]
    named = fatal or list(analysis.conditions)
    resources = {name: condition for condition in named if (name := _resource_of(condition))}
    if len(resources) == len(named):
        wanted = " and ".join(request.words(name) for name in resources)
        text = f"{jobs}: 0 of {total} have {wanted}{_largest(analysis, resources)}"
        remedy = "lower " + " or ".join(f"{settings}.{name}" for name in resources)
        if fatal and len(analysis.conditions) == 1:
            return Diagnosis(Category.NO_SLOT_LARGE_ENOUGH, text, remedy)
        counts = _counts(analysis.conditions, request, settings)
        return Diagnosis(Category.NO_SLOT_LARGE_ENOUGH, f"{text}; {counts}", remedy)
    unmet = next(condition for condition in named if _resource_of(condition) is None)
    if fatal:
        text = f"{jobs}: 0 of {total} meet {_words(unmet, request, settings)}"
    else:
        text = f"{jobs}: 0 of {total} meet all that they ask for"
    if len(analysis.conditions) > 1:
        text += f"; {_counts(analysis.conditions, request, settings)}"
    return Diagnosis(
        Category.NO_SLOT_MATCHES,
        text,
        f"check {settings}.requirements and {settings}.extra_submit, or ask the site for such slots",
    )


def _counts(conditions: tuple[Condition, ...], request: Request, settings: str) -> str:
    """Which condition excludes how many slots."""
    return ", ".join(
        f"{_words(condition, request, settings)} excludes {condition.excluded:,}"
        + (f" ({condition.excluded_alone:,} alone)" if condition.excluded_alone else "")
        for condition in conditions[:_SHOWN]
    )


def _words(condition: Condition, request: Request, settings: str) -> str:
    name = _resource_of(condition)
    return f"{settings}.{name} = {request.words(name)}" if name else f"`{condition.text}`"


def _resource_of(condition: Condition) -> str | None:
    match = _RESOURCE.search(condition.text)
    return match.group(1).lower() if match else None


def _largest(analysis: MatchAnalysis, resources: Mapping[str, Condition]) -> str:
    have = [
        *([f"{analysis.largest_cpus:g} cpus"] if "cpus" in resources else []),
        *([size(analysis.largest_memory * MIB)] if "memory" in resources else []),
    ]
    return f" (the most that one has: {', '.join(have)})" if have else ""


def size(amount: float) -> str:
    """A size in bytes, in words."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB")):
        if amount >= unit:
            return f"{amount / unit:.4g} {name}"
    return f"{amount / MIB:.4g} MiB"
