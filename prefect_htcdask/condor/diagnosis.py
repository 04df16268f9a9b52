"""Why a worker does not run: from what HTCondor says to a category, a summary and what to do.

Pure: from codes and counts to a `Diagnosis`. The categories are stable; automations may match on them.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass

from prefect_htcdask.condor.job_codes import HoldCode


class Category(str, enum.Enum):
    """What kind of fault keeps a worker from running. Automations match on the values: none is ever renamed.

    Each has a section in docs/troubleshooting.md, in this order.
    """

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
    NO_SLOT_MATCHES = "no_slot_matches"
    SLOTS_REFUSE = "slots_refuse"
    LOW_PRIORITY = "low_priority"
    LIMIT_REACHED = "limit_reached"
    WAITING = "waiting"
    NEVER_JOINED = "never_joined"
    CANNOT_JOIN = "cannot_join"
    DIED_AT_START = "died_at_start"
    DIED = "died"
    OUT_OF_MEMORY = "out_of_memory"
    DISK_FULL = "disk_full"
    VERSIONS_DIFFER = "versions_differ"
    PACKAGE_MISSING = "package_missing"
    PYTHON_MISSING = "python_missing"
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

    @property
    def level(self) -> str:
        """The level at which it is logged: ``info`` for what passes, ``error`` for what does so by no waiting."""
        if self.category in _PASSES:
            return "info"
        return "error" if self.category in _STAYS else "warning"


_PASSES = frozenset({Category.POOL_FULL, Category.LOW_PRIORITY, Category.WAITING, Category.EVICTED})
_STAYS = frozenset({Category.DISK_FULL, *(one for one in Category if one.value.startswith("held_"))})


# `{worker}` stands for where the job's settings are.
_HOLDS: dict[int, tuple[Category, str]] = {
    HoldCode.USER_REQUEST: (Category.HELD_BY_USER, "someone held it: condor_release lets it go on"),
    HoldCode.JOB_POLICY: (
        Category.HELD_POLICY,
        "its own PERIODIC_HOLD or a site policy held it: ask the site, or change {worker}.extra_submit",
    ),
    HoldCode.JOB_POLICY_UNDEFINED: (
        Category.HELD_POLICY,
        "a policy of its own cannot be evaluated: change {worker}.extra_submit",
    ),
    HoldCode.FAILED_TO_CREATE_PROCESS: (
        Category.HELD_EXECUTABLE,
        "the execute host could not start it: check {worker}.python and {worker}.container_image",
    ),
    HoldCode.UNABLE_TO_OPEN_OUTPUT: (
        Category.HELD_TRANSFER,
        "output files did not come back: is there room on this host?",
    ),
    HoldCode.UNABLE_TO_OPEN_INPUT: (
        Category.HELD_TRANSFER,
        "its input cannot be opened: is condor.directory readable by the schedd?",
    ),
    HoldCode.TRANSFER_OUTPUT_ERROR: (
        Category.HELD_TRANSFER,
        "files could not be brought back: is this host's staging directory writable by the schedd?",
    ),
    HoldCode.TRANSFER_INPUT_ERROR: (
        Category.HELD_TRANSFER,
        "input files could not be read: set condor.spool where the schedd cannot read this host's files",
    ),
    HoldCode.IWD_ERROR: (
        Category.HELD_TRANSFER,
        "its initial directory does not exist on the schedd: set condor.spool",
    ),
    HoldCode.SPOOLING_INPUT: (Category.HELD_TRANSFER, "its input is still being spooled"),
    HoldCode.HOOK_PREPARE_JOB_FAILURE: (Category.HELD_POLICY, "a hook of the execute host held it: ask the site"),
    HoldCode.STARTD_HELD_JOB: (
        Category.HELD_POLICY,
        "the execute host's WANT_HOLD policy held it: ask the site, or ask for more resources",
    ),
    HoldCode.UNABLE_TO_INIT_USER_LOG: (
        Category.HELD_TRANSFER,
        "its event log cannot be written: is condor.directory writable by the schedd?",
    ),
    HoldCode.SYSTEM_POLICY: (Category.HELD_POLICY, "a system policy held it: ask the site, or ask for more resources"),
    HoldCode.SYSTEM_POLICY_UNDEFINED: (Category.HELD_POLICY, "a system policy cannot be evaluated: ask the site"),
    HoldCode.MAX_TRANSFER_INPUT_SIZE_EXCEEDED: (
        Category.HELD_TRANSFER,
        "its input is larger than the pool allows: ask the site",
    ),
    HoldCode.MAX_TRANSFER_OUTPUT_SIZE_EXCEEDED: (
        Category.HELD_TRANSFER,
        "its output is larger than the pool allows: ask the site",
    ),
    HoldCode.JOB_OUT_OF_RESOURCES: (
        Category.HELD_MEMORY,
        "it used more memory than it asked for: raise {worker}.memory",
    ),
    HoldCode.INVALID_DOCKER_IMAGE: (
        Category.HELD_CONTAINER,
        "the container image could not be run: check {worker}.container_image",
    ),
    HoldCode.FAILED_TO_RUN_CONTAINER_TEST: (
        Category.HELD_CONTAINER,
        "the execute host's container test failed: check {worker}.container_image",
    ),
    HoldCode.JOB_DURATION_EXCEEDED: (
        Category.HELD_POLICY,
        "it ran longer than allowed: set {worker}.lifetime below the pool's limit",
    ),
    HoldCode.JOB_EXECUTE_EXCEEDED: (
        Category.HELD_POLICY,
        "it ran longer than allowed: set {worker}.lifetime below the pool's limit",
    ),
    HoldCode.HOOK_SHADOW_PREPARE_JOB_FAILURE: (Category.HELD_POLICY, "a hook of the schedd held it: ask the site"),
}


# By code and subcode, where the subcode tells more: 102 and 104 are those of HTCondor's own limits of memory and disk.
_MEMORY, _DISK = 102, 104
_LIMITS: dict[tuple[int, int], tuple[Category, str]] = {
    (HoldCode.STARTD_HELD_JOB, _MEMORY): _HOLDS[HoldCode.JOB_OUT_OF_RESOURCES],
    **dict.fromkeys(
        [(HoldCode.STARTD_HELD_JOB, _DISK), (HoldCode.JOB_OUT_OF_RESOURCES, _DISK)],
        (Category.DISK_FULL, "it used more disk than it asked for: raise {worker}.disk, or keep less data in it"),
    ),
}


def diagnose_hold(code: int, subcode: int, reason: str, settings: str = "worker") -> Diagnosis:
    """What a hold means.

    Args:
        code: HoldReasonCode.
        subcode: HoldReasonSubCode.
        reason: HoldReason.
        settings: where this worker's settings are.
    """
    unknown = Category.HELD_OTHER, "condor_q -hold and the site's documentation may tell more"
    category, remedy = _LIMITS.get((code, subcode)) or _HOLDS.get(code, unknown)
    return Diagnosis(
        category,
        f"held by HTCondor: {reason.strip() or 'no reason given'} (code {code}.{subcode})",
        remedy.replace("{worker}", settings),
    )


def diagnose_never_joined(running: int) -> Diagnosis:
    """What it means that jobs run without their workers joining the scheduler.

    Args:
        running: how many there are.
    """
    jobs = "1 worker job runs, but its worker has"
    if running != 1:
        jobs = f"{running:,} worker jobs run, but their workers have"
    return Diagnosis(
        Category.NEVER_JOINED,
        f"{jobs} not joined the scheduler",
        "can the execute hosts reach the gateway's proxy (gateway.proxy_address)? A large image takes its time as well",
    )


def diagnose_eviction(host: str | None, reason: str) -> Diagnosis:
    """What an eviction means: HTCondor starts the job again, and the worker has handed its tasks back."""
    where = f" from {host}" if host else ""
    if "StreamHandler" in reason:
        # HTCondor's starter gives a job up whose stderr it cannot write to the submitting host (stream_handler.cpp).
        return Diagnosis(
            Category.DISK_FULL,
            f"evicted{where}: {reason.strip()}",
            "its stderr could not be written here: free space on this host's disk, or set condor.directory to another",
        )
    return Diagnosis(Category.EVICTED, f"evicted{where}: {reason.strip() or 'no reason given'}", "")


def diagnose_removal(reason: str) -> Diagnosis:
    """What a removal means."""
    return Diagnosis(Category.REMOVED, f"removed: {reason.strip() or 'no reason given'}", "")


EXIT_PROGRAM_MISSING = 127
"""What env(1), which starts the worker's interpreter, ends with where it does not find it."""

_SETTING = re.compile(r"\bworker\.(?=(memory|python|container_image)\b)")

# What is looked for in a worker's last words, what it means, and what to do. `{worker}` as above.
_LAST_WORDS: tuple[tuple[str, Category, str], ...] = (
    (
        "could not join the scheduler",
        Category.CANNOT_JOIN,
        "can the execute host reach the gateway's proxy (gateway.proxy_address)?",
    ),
    ("No space left on device", Category.DISK_FULL, "raise {worker}.disk, or keep less data in each worker"),
    ("MemoryError", Category.OUT_OF_MEMORY, "raise {worker}.memory, or give it fewer threads"),
    (
        "ModuleNotFoundError",
        Category.PACKAGE_MISSING,
        "install it in the worker's environment: {worker}.container_image and {worker}.python choose that",
    ),
)


def diagnose_exit(
    exit_code: int | None,
    signal: int | None,
    stderr: Sequence[str],
    *,
    joined: bool = False,
    settings: str = "worker",
) -> Diagnosis:
    """Why a worker that ended by itself did so.

    Args:
        exit_code: its exit status, or `None` where a signal ended it.
        signal: that signal.
        stderr: the last lines of its stderr.
        joined: whether it had joined the scheduler before.
        settings: where this worker's settings are.
    """
    ours = [line.removeprefix("htcdask: ") for line in stderr if line.startswith("htcdask: ")]
    # The carets of a traceback say nothing in one line.
    telling = [line.strip() for line in stderr if line.strip(" ~^")]
    last = " | ".join(ours[-1:] or telling[-3:]) or "it left no word on stderr"
    # Its own words name the settings as they are where there is one kind of worker.
    spoken = {
        75: Category.OUT_OF_MEMORY,
        64: Category.VERSIONS_DIFFER,
        69: Category.PACKAGE_MISSING,
    }
    if exit_code in spoken:
        return Diagnosis(spoken[exit_code], _SETTING.sub(f"{settings}.", last), "")
    ended = f"signal {signal}" if signal is not None else f"exit status {exit_code}"
    summary = f"worker ended with {ended}: {last}"
    if exit_code == EXIT_PROGRAM_MISSING and not joined:
        return Diagnosis(
            Category.PYTHON_MISSING,
            summary,
            f"the execute host has no such interpreter: check {settings}.python and {settings}.container_image",
        )
    for words, category, remedy in _LAST_WORDS:
        if any(words in line for line in (*ours[-1:], *telling[-3:])):
            return Diagnosis(category, summary, remedy.replace("{worker}", settings))
    return Diagnosis(
        Category.DIED if joined else Category.DIED_AT_START,
        summary,
        "its stderr is kept with the worker logs",
    )
