"""Why a worker does not run: from what HTCondor says to a category, a summary and what to do.

Pure: from codes and counts to a `Diagnosis`. The categories are stable; automations may match on them.
Hold codes: HTCondor manual, job ClassAd attributes, HoldReasonCode.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class Category(str, enum.Enum):
    """What kind of fault keeps a worker from running."""

    HELD_BY_USER = "held_by_user"
    HELD_TRANSFER = "held_transfer"
    HELD_EXECUTABLE = "held_executable"
    HELD_POLICY = "held_policy"
    HELD_MEMORY = "held_memory"
    HELD_CONTAINER = "held_container"
    HELD_OTHER = "held_other"
    POOL_FULL = "pool_full"
    POOL_EMPTY = "pool_empty"
    NO_SLOT_LARGE_ENOUGH = "no_slot_large_enough"
    WAITING = "waiting"
    DIED_AT_START = "died_at_start"
    OUT_OF_MEMORY = "out_of_memory"
    VERSIONS_DIFFER = "versions_differ"
    PACKAGE_MISSING = "package_missing"
    EVICTED = "evicted"
    REMOVED = "removed"


@dataclass(frozen=True)
class Diagnosis:
    """One finding, in words for the flow run's log."""

    category: Category
    summary: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.summary} ({self.remedy})" if self.remedy else self.summary


_HOLD_CATEGORIES: dict[int, tuple[Category, str]] = {
    1: (Category.HELD_BY_USER, "someone held it: condor_release lets it go on"),
    3: (
        Category.HELD_POLICY,
        "its own PERIODIC_HOLD or a site policy held it: ask the site, or change worker.extra_submit",
    ),
    6: (
        Category.HELD_EXECUTABLE,
        "the execute host could not start it: check worker.python and worker.container_image",
    ),
    7: (Category.HELD_TRANSFER, "output files did not come back: is there room on this host?"),
    12: (
        Category.HELD_TRANSFER,
        "files could not be brought back: is this host's staging directory writable by the schedd?",
    ),
    13: (
        Category.HELD_TRANSFER,
        "input files could not be read: set condor.spool where the schedd cannot read this host's files",
    ),
    14: (Category.HELD_TRANSFER, "its initial directory does not exist on the schedd: set condor.spool"),
    16: (Category.HELD_TRANSFER, "its input is still being spooled"),
    21: (
        Category.HELD_POLICY,
        "the execute host's WANT_HOLD policy held it: ask the site, or ask for more resources",
    ),
    26: (Category.HELD_POLICY, "a system policy held it: ask the site, or ask for more resources"),
    34: (Category.HELD_MEMORY, "it used more memory than it asked for: raise worker.memory"),
    35: (Category.HELD_CONTAINER, "the container image could not be run: check worker.container_image"),
    46: (Category.HELD_POLICY, "it ran longer than allowed: set worker.lifetime below the pool's limit"),
    47: (Category.HELD_POLICY, "it ran longer than allowed: set worker.lifetime below the pool's limit"),
}


def diagnose_hold(code: int, subcode: int, reason: str) -> Diagnosis:
    """What a hold means, from its code, subcode and text."""
    category, remedy = _HOLD_CATEGORIES.get(
        code, (Category.HELD_OTHER, "condor_q -hold and the site's documentation may tell more")
    )
    return Diagnosis(
        category, f"held by HTCondor: {reason.strip() or 'no reason given'} (code {code}.{subcode})", remedy
    )


def diagnose_exit(exit_code: int | None, signal: int | None, stderr: Sequence[str]) -> Diagnosis:
    """Why a worker that ended by itself did so, from its exit status and the last lines of its stderr."""
    ours = [line.removeprefix("htcdask: ") for line in stderr if line.startswith("htcdask: ")]
    # The carets of a traceback say nothing in one line.
    telling = [line.strip() for line in stderr if line.strip(" ~^")]
    last = " | ".join(ours[-1:] or telling[-3:]) or "it left no word on stderr"
    if exit_code == 75:
        return Diagnosis(Category.OUT_OF_MEMORY, last, "")
    if exit_code == 64:
        return Diagnosis(Category.VERSIONS_DIFFER, last, "")
    if exit_code == 69:
        return Diagnosis(Category.PACKAGE_MISSING, last, "")
    ended = f"signal {signal}" if signal is not None else f"exit status {exit_code}"
    return Diagnosis(
        Category.DIED_AT_START,
        f"worker ended with {ended}: {last}",
        "its stderr is kept with the worker logs",
    )


def diagnose_waiting(
    slots: Sequence[Mapping[str, Any]], *, cpus: int, memory: int, gpus: int, waiting: int, settings: str = "worker"
) -> Diagnosis:
    """Why idle jobs do not start, from the pool's slots.

    Args:
        slots: slot ads with TotalSlotCpus, TotalSlotMemory (MiB), Cpus, Memory (MiB), State, SlotType.
        cpus: cores that a worker asks for.
        memory: bytes that it asks for.
        gpus: GPUs that it asks for.
        waiting: number of idle worker jobs.
        settings: where these workers' settings are.
    """
    jobs = f"{waiting} worker job{'s' if waiting != 1 else ''} wait{'s' if waiting == 1 else ''}"
    machines = [slot for slot in slots if slot.get("SlotType") != "Dynamic"]
    if not machines:
        return Diagnosis(Category.POOL_EMPTY, f"{jobs}: the pool has no slot at all", "is a startd running there?")
    memory_mib = memory / 2**20

    def large_enough(slot: Mapping[str, Any]) -> bool:
        total_cpus = slot.get("TotalSlotCpus") or slot.get("Cpus") or 0
        total_memory = slot.get("TotalSlotMemory") or slot.get("Memory") or 0
        return bool(total_cpus >= cpus and total_memory >= memory_mib and (slot.get("Gpus") or 0) >= gpus)

    fitting = [slot for slot in machines if large_enough(slot)]
    if not fitting:
        wanted = f"{cpus} cpus, {memory_mib:.0f} MiB" + (f" and {gpus} GPUs" if gpus else "")
        return Diagnosis(
            Category.NO_SLOT_LARGE_ENOUGH,
            f"{jobs}: 0 of {len(machines)} slots have {wanted}",
            f"lower {settings}.cpus, {settings}.memory or {settings}.gpus",
        )
    free = [
        slot
        for slot in fitting
        if (slot.get("Cpus") or 0) >= cpus
        and (slot.get("Memory") or 0) >= memory_mib
        and (slot.get("SlotType") == "Partitionable" or slot.get("State") == "Unclaimed")
    ]
    if not free:
        claimed = sum(1 for slot in slots if slot.get("State") == "Claimed")
        return Diagnosis(
            Category.POOL_FULL,
            f"{jobs}: the pool is full ({claimed} slots claimed, none of the {len(fitting)} large enough has room)",
            f"wait, ask for less, or raise {settings}.start_timeout",
        )
    return Diagnosis(
        Category.WAITING,
        f"{jobs}: {len(free)} slots have room, the negotiator has not matched them yet",
        f"your priority, accounting group or {settings}.requirements may stand in the way: condor_q -better-analyze "
        "tells",
    )
