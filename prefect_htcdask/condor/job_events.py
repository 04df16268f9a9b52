"""What became of the worker jobs: from job events, or from job ads where the event log is not local.

`JobRecord` and `apply` are pure; `EventLogReader`, `QueueReader` and `DoubtingReader` do the reading.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import htcondor2

from prefect_htcdask.condor.event_times import SERVER_TIME, EventTimes, by_our_clock, seconds_ahead
from prefect_htcdask.condor.job_codes import HoldCode, JobState, JobStatus
from prefect_htcdask.condor.schedd import ScheddClient, ScheddError


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
_TOLD_ONCE = _RUN_ENDS | {"SUBMIT", "JOB_RELEASED"}
_KNOWN = _TOLD_ONCE | {"IMAGE_SIZE"}


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
    if event == "JOB_HELD" and int(data.get("HoldReasonCode") or 0) == HoldCode.SPOOLING_INPUT:
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

    def look_at_next_read(self) -> None:
        """Have the next read look in any case."""

    def close(self) -> None:
        """Let go of what is open."""


_FEW = 5
"""Looks in a row at an event that cannot be read."""


class _OpenLog:
    """A job event log, held open: the file that was there when it was opened, whatever takes its name since.

    Args:
        path: the log.
        fresh: whether nothing of it was read before.
    """

    def __init__(self, path: Path, fresh: bool = True) -> None:
        while True:
            before = path.stat()
            self._log = htcondor2.JobEventLog(str(path))
            self.identity = before.st_dev, before.st_ino
            if (path.stat().st_dev, path.stat().st_ino) == self.identity:
                break
            self._log.close()
        self.size = before.st_size
        self.fresh = fresh
        self.failed = False

    def read(self) -> list[tuple[str, str, float, dict[str, Any]]]:
        """Events since the last read: type, job, time as the log has it, and attributes."""
        events: list[tuple[str, str, float, dict[str, Any]]] = []
        try:
            for event in self._log.events(stop_after=0):
                data = {attribute: event[attribute] for attribute in event}
                events.append((event.type.name, f"{event.cluster}.{event.proc}", float(event.timestamp), data))
        except htcondor2.HTCondorException:
            # An event of which only a part is there. The reader goes on behind it: a new one may find it whole.
            self.failed = True
        return events

    def close(self) -> None:
        self._log.close()


class EventLogReader:
    """Reads the job event log, which costs the schedd nothing.

    The bindings say nothing where their file was replaced or truncated: it is watched, and the new one read as well. A
    shadow holds the file of its start, so that one that was moved away is read on.

    Args:
        path: the log.

    Attributes:
        replaced: how often the file was not the one, or not as long, as at the look before, or could not be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._times = EventTimes(time.time())
        self._logs = [_OpenLog(path)]
        self._first = True
        self._seen: set[tuple[str, str, float]] = set()
        self._lost = False
        self._failures = 0
        self.replaced = 0

    def read(self, table: JobTable) -> list[JobChange]:
        """Changes that the log tells since the last read."""
        events = self._events()
        now = time.time()
        told = [when for _, _, when, _ in events]
        if self._first:
            self._first = False
            times = self._times.before(told, self._written(now), now)
        else:
            times = self._times.since(told, now)
        changes = []
        for (name, job_id, _, data), when in zip(events, times, strict=True):
            if name in _KNOWN:
                change = apply(table, name, job_id, when, data)
                if change is not None:
                    changes.append(change)
        return changes

    def _written(self, now: float) -> float:
        try:
            return self._path.stat().st_mtime
        except OSError:
            return now

    def _events(self) -> list[tuple[str, str, float, dict[str, Any]]]:
        events = [event for log in self._logs for event in log.read() if log.fresh or event[:3] not in self._seen]
        self._failures = self._failures + 1 if any(log.failed for log in self._logs) else 0
        if self._failures == _FEW:
            self.replaced += 1
        if self._is_another():
            self.replaced += 1
            # It may be a copy of the one before.
            events += [event for event in self._logs[-1].read() if event[:3] not in self._seen]
        self._seen.update(event[:3] for event in events if event[0] in _TOLD_ONCE)
        return events

    def _is_another(self) -> bool:
        """Whether the file was replaced or truncated; the new one is open then."""
        current = self._logs[-1]
        try:
            if not self._path.exists():
                # Moved away or deleted: the schedd makes a new one at its next event, and we may be faster.
                os.close(os.open(self._path, os.O_CREAT | os.O_WRONLY, 0o600))
            status = self._path.stat()
            identity, grown = (status.st_dev, status.st_ino), status.st_size >= current.size
            if identity == current.identity and grown and not current.failed:
                current.size = status.st_size
                return False
            self._logs.append(_OpenLog(self._path, fresh=False))
        except (OSError, htcondor2.HTCondorException):
            # Its directory is gone, or the disk is full, or it is not ours any more.
            self.replaced += not self._lost
            self._lost = True
            return False
        if identity != current.identity:
            return True
        self._logs.remove(current)
        current.close()
        return not grown

    def look_at_next_read(self) -> None:
        """Reading the log is never put off."""

    def close(self) -> None:
        """Close the log."""
        for log in self._logs:
            log.close()


_STATUS: dict[int, str] = {
    JobStatus.IDLE: "RELEASED_OR_IDLE",
    JobStatus.RUNNING: "EXECUTE",
    JobStatus.REMOVED: "JOB_ABORTED",
    JobStatus.COMPLETED: "JOB_TERMINATED",
    JobStatus.HELD: "JOB_HELD",
    JobStatus.TRANSFERRING_OUTPUT: "EXECUTE",
    JobStatus.SUSPENDED: "EXECUTE",
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
    SERVER_TIME,
]
_LENIENCE = 2.0
"""Seconds by which two clocks may differ and count as one: the schedd tells whole seconds."""


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
    last = (record and record.last_start) or 0.0
    unseen = float(ad.get("JobCurrentStartExecutingDate") or 0) >= started > last + (_LENIENCE if last else 0)
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
        self._ahead = 0.0

    def read(self, table: JobTable) -> list[JobChange]:
        """Changes that the queue shows, or none where the last look was a short time ago."""
        now = time.monotonic()
        if now < self._next:
            return []
        self._next = now + self._interval
        queued, ended = self.look(table)
        ads = {**queued, **ended}
        changes = take_ads(table, ads)
        for job_id, ad in ads.items():
            # A job that another supervisor submitted: only its ad says what it is.
            if (record := table.records.get(job_id)) is not None:
                record.group = record.group or str(ad.get("HTCDaskWorkerGroup") or "")
        return changes

    def look(self, table: JobTable) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        """The ads of all jobs in the queue, and of those in the table that have left it, by job."""
        asked = time.time()
        ads = self._schedd.query(self._constraint, _PROJECTION)
        if ads and ads[0].get(SERVER_TIME):  # ads of the history have none
            self._ahead = seconds_ahead(float(ads[0][SERVER_TIME]), asked, time.time())
        queued = self._by_job(ads)
        gone = {record.job_id for record in table.records.values() if record.in_queue} - queued.keys()
        lost = {"JobStatus": JobStatus.REMOVED, "RemoveReason": "no longer in the queue, nor in the history"}
        past = self._by_job(self._schedd.history(self._constraint, _PROJECTION)) if gone else {}
        return queued, {job_id: past.get(job_id, lost) for job_id in gone}

    def _by_job(self, ads: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Ads by their jobs, of several the first: the history tells the newest first."""
        found: dict[str, dict[str, Any]] = {}
        for ad in ads:
            found.setdefault(f"{ad['ClusterId']}.{ad['ProcId']}", by_our_clock(ad, self._ahead))
        return found

    def look_at_next_read(self) -> None:
        """Look at the next read, whenever the last one was."""
        self._next = 0.0

    def close(self) -> None:
        """Nothing is open."""


def take_ads(table: JobTable, ads: Mapping[str, dict[str, Any]]) -> list[JobChange]:
    """Bring the table up to date with job ads; returns what has changed."""
    return [
        change
        for job_id, ad in ads.items()
        for event, when, data in events_of_ad(table.records.get(job_id), ad)
        if (change := apply(table, event, job_id, when, data)) is not None
    ]


class DoubtingReader:
    """Reads the event log, and looks at the queue now and then: a log may fall silent, and nothing tells that it has.

    What the log has not told by the second look at a job, it will not: between two looks it has time to. Where that
    happens, or the log was replaced, the queue is looked at more often from then on.

    Args:
        log: the job event log.
        queue: the queue.
        complain: is told, in words, that the log cannot be relied on.
        interval: seconds between two looks at the queue.
        often: seconds between them where the log is not to be relied on.
        pause: seconds between the two looks that make sure.
    """

    def __init__(
        self,
        log: EventLogReader,
        queue: QueueReader,
        complain: Callable[[str], None],
        interval: float = 300.0,
        often: float = 60.0,
        pause: float = 5.0,
    ) -> None:
        self._log = log
        self._queue = queue
        self._complain = complain
        self._interval = interval
        self._often = often
        self._pause = pause
        self._next = time.monotonic() + interval
        self._replaced = log.replaced
        self._untold: dict[str, tuple[str, ...]] = {}
        self._at_once = False

    def read(self, table: JobTable) -> list[JobChange]:
        """Changes that the log tells, and those that it should have told."""
        changes = self._log.read(table)
        now = time.monotonic()
        if self._log.replaced != self._replaced:
            self._replaced = self._log.replaced
            self._interval = self._often
            self._next = min(self._next, now + self._pause)
            self._complain("was truncated, replaced or damaged")
        if self._at_once or (now >= self._next and any(record.in_queue for record in table.records.values())):
            # What the log has told is told, whether or not the schedd answers.
            with suppress(ScheddError):
                changes += self._look(table, now)
        return changes

    def _look(self, table: JobTable, now: float) -> list[JobChange]:
        self._next = now + self._interval
        queued, ended = self._queue.look(table)
        if not self._at_once:
            # A removed or completed job is in the queue until its worker has ended, and the log tells of that.
            leaving = JobStatus.REMOVED, JobStatus.COMPLETED
            queued = {job_id: ad for job_id, ad in queued.items() if ad.get("JobStatus") not in leaving}
        ads = {**queued, **ended}
        untold = {job_id: events for job_id, ad in ads.items() if (events := _steps(table.records.get(job_id), ad))}
        sure = untold if self._at_once else {job: what for job, what in untold.items() if self._untold.get(job) == what}
        if sure and not self._at_once:
            self._interval = self._often
            self._complain(f"did not tell what became of {len(sure)} job{'s'[: len(sure) > 1]}")
        self._at_once = False
        self._untold = {job_id: events for job_id, events in untold.items() if job_id not in sure}
        if self._untold:
            self._next = now + self._pause
        return take_ads(table, {job_id: ads[job_id] for job_id in sure})

    def look_at_next_read(self) -> None:
        """Believe the queue at the next read."""
        self._at_once = True

    def close(self) -> None:
        """Close the log."""
        self._log.close()


def _steps(record: JobRecord | None, ad: Mapping[str, Any]) -> tuple[str, ...]:
    """What an ad tells of a job beyond what is known of it; of one that is not known, or has ended, nothing."""
    if record is None or not record.in_queue:
        return ()
    events = [event for event, _, _ in events_of_ad(record, ad) if event != "IMAGE_SIZE"]
    executing = float(ad.get("JobCurrentStartExecutingDate") or 0) >= float(ad.get("JobCurrentStartDate") or 0) > 0
    if events == ["EXECUTE"] and not executing:
        return ()  # its input is still on the way, and then the log tells
    return tuple(events)
