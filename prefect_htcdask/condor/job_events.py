"""What became of the worker jobs: from job events, or from job ads where the event log is not local.

`JobRecord` and `apply` are pure; `EventLogReader` and `QueueReader` do the reading.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import htcondor2

from .diagnosis import SPOOLING
from .schedd import ScheddClient


class JobState(str, enum.Enum):
    """Where a job stands. Everything but the last two is in the queue."""

    IDLE = "idle"
    RUNNING = "running"
    HELD = "held"
    REMOVED = "removed"
    EXITED = "exited"


@dataclass
class JobRecord:
    """What is known of one worker job. Times are Unix times in seconds.

    `started` is that of a run which lasts; `last_start` stays when it is over, and `ended` is when the job left the
    queue. `memory_mib` is the most memory that it was seen to use.
    """

    job_id: str
    state: JobState = JobState.IDLE
    group: str = ""
    submitted: float = 0.0
    started: float | None = None
    last_start: float | None = None
    ended: float | None = None
    host: str | None = None
    starts: int = 0
    run_seconds: float = 0.0
    exit_code: int | None = None
    exit_signal: int | None = None
    reason: str = ""
    hold_code: int = 0
    hold_subcode: int = 0
    memory_mib: float | None = None
    evictions: int = 0
    holds: int = 0

    @property
    def in_queue(self) -> bool:
        """Whether the schedd still has it to run."""
        return self.state not in (JobState.REMOVED, JobState.EXITED)


@dataclass(frozen=True)
class JobChange:
    """A job's step from one state to another, with what HTCondor said of it."""

    job_id: str
    before: JobState | None
    after: JobState
    what: str  # submitted, started, memory, evicted, held, released, removed, exited
    reason: str = ""


@dataclass
class JobTable:
    """All worker jobs of a cluster that this supervisor knows of."""

    records: dict[str, JobRecord] = field(default_factory=dict)

    def get(self, job_id: str) -> JobRecord:
        """The record of a job, made if it is new."""
        return self.records.setdefault(job_id, JobRecord(job_id))

    def in_state(self, *states: JobState) -> list[JobRecord]:
        """Records in any of the states."""
        return [record for record in self.records.values() if record.state in states]


# Names of htcondor2.JobEventType, so that tests need no event log.
_RUN_ENDS = {
    "EXECUTE",  # one that follows another: the end of the first run was not told
    "JOB_EVICTED",
    "SHADOW_EXCEPTION",
    "JOB_RECONNECT_FAILED",
    "JOB_TERMINATED",
    "JOB_ABORTED",
    "JOB_HELD",
}
_KNOWN = _RUN_ENDS | {"SUBMIT", "JOB_RELEASED", "IMAGE_SIZE"}


def apply(table: JobTable, event: str, job_id: str, when: float, data: Mapping[str, Any]) -> JobChange | None:
    """Take one job event into the table.

    Args:
        table: changed in place.
        event: name of the event's type, as in `htcondor2.JobEventType`.
        job_id: ``cluster.proc``.
        when: the event's Unix time in seconds.
        data: the event's attributes.

    Returns:
        the change, or `None` where nothing changed.
    """
    if event not in _KNOWN:
        return None
    new = job_id not in table.records
    record = table.get(job_id)
    before = record.state
    if not record.in_queue:
        return None
    if event == "JOB_HELD" and int(data.get("HoldReasonCode") or 0) == SPOOLING:
        return None
    if event in _RUN_ENDS and before is JobState.RUNNING and record.started is not None:
        record.run_seconds += max(0.0, when - record.started)
        record.started = None
    if event == "SUBMIT":
        record.submitted = record.submitted or when
        return JobChange(job_id, None if new else before, record.state, "submitted")
    if event == "EXECUTE":
        record.state, record.starts = JobState.RUNNING, record.starts + 1
        record.started = record.last_start = when
        record.host = str(data.get("SlotName") or data.get("ExecuteHost") or "")
        return JobChange(job_id, before, record.state, "started", record.host)
    if event in ("JOB_EVICTED", "SHADOW_EXCEPTION", "JOB_RECONNECT_FAILED"):
        if before is JobState.HELD:
            return None
        record.state, record.evictions = JobState.IDLE, record.evictions + 1
        record.reason = str(data.get("Reason") or data.get("Message") or "")
        return JobChange(job_id, before, record.state, "evicted", record.reason)
    if event == "JOB_HELD":
        record.state, record.holds = JobState.HELD, record.holds + 1
        record.reason = str(data.get("HoldReason") or "")
        record.hold_code = int(data.get("HoldReasonCode") or 0)
        record.hold_subcode = int(data.get("HoldReasonSubCode") or 0)
        return JobChange(job_id, before, record.state, "held", record.reason)
    if event == "JOB_RELEASED":
        if before is not JobState.HELD:
            return None
        record.state = JobState.IDLE
        return JobChange(job_id, before, record.state, "released", str(data.get("Reason") or ""))
    if event == "JOB_TERMINATED":
        _saw_memory(record, data)
        record.state, record.ended = JobState.EXITED, when
        if data.get("TerminatedNormally", True):
            record.exit_code = int(data.get("ReturnValue") or 0)
        else:
            record.exit_signal = int(data.get("TerminatedBySignal") or 0)
        return JobChange(job_id, before, record.state, "exited")
    if event == "JOB_ABORTED":
        record.state, record.ended = JobState.REMOVED, when
        record.reason = str(data.get("Reason") or "")
        return JobChange(job_id, before, record.state, "removed", record.reason)
    if event == "IMAGE_SIZE" and _saw_memory(record, data):
        return JobChange(job_id, before, record.state, "memory")
    return None


def _saw_memory(record: JobRecord, data: Mapping[str, Any]) -> bool:
    """Take in what an event tells of a job's memory, in MiB, or KiB of its resident set; whether it is a new peak."""
    used, resident = (
        float(value) if isinstance(value := data.get(name), (int, float)) else 0.0
        for name in ("MemoryUsage", "ResidentSetSize")
    )
    used = used or resident / 1024
    if used <= (record.memory_mib or 0.0):
        return False
    record.memory_mib = used
    return True


class JobReader(Protocol):
    """Brings a job table up to date."""

    def read(self, table: JobTable) -> list[JobChange]:
        """Changes since the last read."""

    def hurry(self) -> None:
        """Have the next read look in any case."""

    def close(self) -> None:
        """Let go of what is open."""


class EventLogReader:
    """Reads the job event log, which costs the schedd nothing."""

    def __init__(self, path: Path) -> None:
        self._log = htcondor2.JobEventLog(str(path))

    def read(self, table: JobTable) -> list[JobChange]:
        """Changes that the log tells since the last read."""
        changes = []
        for event in self._log.events(stop_after=0):
            name = event.type.name
            if name not in _KNOWN:
                continue
            data = {attribute: event[attribute] for attribute in event}
            change = apply(table, name, f"{event.cluster}.{event.proc}", float(event.timestamp), data)
            if change is not None:
                changes.append(change)
        return changes

    def hurry(self) -> None:
        """Reading the log is never put off."""

    def close(self) -> None:
        """Close the log."""
        self._log.close()


_STATUS = {
    1: "RELEASED_OR_IDLE",
    2: "EXECUTE",
    3: "JOB_ABORTED",
    4: "JOB_TERMINATED",
    5: "JOB_HELD",
    6: "EXECUTE",
    7: "EXECUTE",
}
_PROJECTION = [
    "ClusterId",
    "ProcId",
    "JobStatus",
    "EnteredCurrentStatus",
    "QDate",
    "RemoteHost",
    "LastRemoteHost",
    "HoldReason",
    "HoldReasonCode",
    "HoldReasonSubCode",
    "NumJobStarts",
    "HTCDaskWorkerGroup",
    "MemoryUsage",
    "ResidentSetSize",
    "ExitCode",
    "ExitSignal",
    "ExitBySignal",
    "RemoveReason",
    "JobCurrentStartDate",
    "JobCurrentStartExecutingDate",
]


def events_of_ad(record: JobRecord | None, ad: Mapping[str, Any]) -> Iterable[tuple[str, float, dict[str, Any]]]:
    """The events that lead from what is known of a job to what its ad says now."""
    status = int(ad.get("JobStatus") or 0)
    when = float(ad.get("EnteredCurrentStatus") or time.time())
    name = _STATUS.get(status)
    state = record.state if record else None
    if record is None:
        yield "SUBMIT", float(ad.get("QDate") or when), {}
        state = JobState.IDLE
    if ad.get("MemoryUsage") or ad.get("ResidentSetSize"):
        yield "IMAGE_SIZE", when, dict(ad)
    started = float(ad.get("JobCurrentStartDate") or 0)
    # It may also have run, and ended, between two looks. A start that ended as its input was brought is no run.
    unseen = float(ad.get("JobCurrentStartExecutingDate") or 0) >= started > ((record and record.last_start) or 0)
    if state is not JobState.RUNNING and (name == "EXECUTE" or unseen):
        yield "EXECUTE", started or when, {"SlotName": ad.get("RemoteHost") or ad.get("LastRemoteHost")}
        state = JobState.RUNNING
    if name == "EXECUTE":
        return
    if name == "JOB_HELD" and state is not JobState.HELD:
        yield "JOB_HELD", when, dict(ad)
    elif name == "RELEASED_OR_IDLE" and state is JobState.RUNNING:
        yield "JOB_EVICTED", when, {"Reason": "no longer running"}
    elif name == "RELEASED_OR_IDLE" and state is JobState.HELD:
        yield "JOB_RELEASED", when, {}
    elif name == "JOB_ABORTED":
        yield "JOB_ABORTED", when, {"Reason": ad.get("RemoveReason")}
    elif name == "JOB_TERMINATED":
        by_signal = bool(ad.get("ExitBySignal"))
        yield (
            "JOB_TERMINATED",
            when,
            {
                "TerminatedNormally": not by_signal,
                "ReturnValue": ad.get("ExitCode"),
                "TerminatedBySignal": ad.get("ExitSignal"),
            },
        )


class QueueReader:
    """Asks the schedd for the jobs of a cluster, seldom: for schedds whose event log is elsewhere.

    Args:
        schedd: the schedd.
        constraint: the cluster's jobs.
        interval: seconds between two queries at least; polling hurts a busy schedd.
    """

    def __init__(self, schedd: ScheddClient, constraint: str, interval: float = 60.0) -> None:
        self._schedd = schedd
        self._constraint = constraint
        self._interval = interval
        self._next = 0.0

    def read(self, table: JobTable) -> list[JobChange]:
        """Changes that the queue shows, or none where the last look was a short time ago."""
        now = time.monotonic()
        if now < self._next:
            return []
        self._next = now + self._interval
        ads = {f"{ad['ClusterId']}.{ad['ProcId']}": ad for ad in self._schedd.query(self._constraint, _PROJECTION)}
        gone = [record.job_id for record in table.records.values() if record.in_queue and record.job_id not in ads]
        if gone:
            for ad in self._schedd.history(self._constraint, _PROJECTION):
                ads.setdefault(f"{ad['ClusterId']}.{ad['ProcId']}", ad)
        for job_id in gone:
            ads.setdefault(job_id, {"JobStatus": 3, "RemoveReason": "no longer in the queue, nor in the history"})
        changes = [
            change
            for job_id, ad in ads.items()
            for event, when, data in events_of_ad(table.records.get(job_id), ad)
            if (change := apply(table, event, job_id, when, data)) is not None
        ]
        for job_id, ad in ads.items():
            # A job that another supervisor submitted: only its ad says what it is.
            if (record := table.records.get(job_id)) is not None:
                record.group = record.group or str(ad.get("HTCDaskWorkerGroup") or "")
        return changes

    def hurry(self) -> None:
        """Look at the next read, whenever the last one was."""
        self._next = 0.0

    def close(self) -> None:
        """Nothing is open."""
