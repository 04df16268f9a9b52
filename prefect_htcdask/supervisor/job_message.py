"""What the supervisor tells the flow's process of one worker job: a message of the kind ``job``."""

from __future__ import annotations

from typing import Any

from prefect_htcdask.condor.diagnosis import Diagnosis
from prefect_htcdask.condor.job_codes import JobState
from prefect_htcdask.condor.job_events import JobRecord
from prefect_htcdask.condor.submit_description import MIB, WorkerSpec


def job_message(
    what: str,
    record: JobRecord,
    group: str,
    spec: WorkerSpec,
    diagnosis: Diagnosis | None = None,
    reason: str = "",
    asked_for: bool = False,
) -> dict[str, Any]:
    """The message. Each carries all that is known of the job, so that one that is lost is made up for by the next.

    Args:
        what: what has happened: ``submitted``, ``started``, ``joined`` (its worker is at the scheduler), ``memory`` (it
            used more than it ever did), ``evicted``, ``held``, ``released``, ``removed`` or ``exited``.
        record: the job.
        group: name of its worker group.
        spec: what was asked for.
        diagnosis: why it does not run; none where nothing is wrong.
        reason: what HTCondor says where there is no diagnosis.
        asked_for: whether we had asked for it: a worker that is no longer needed was removed.

    Returns:
        a dictionary for JSON. ``job_id``, ``group``, ``state`` (a value of `JobState`), ``host`` (its slot, or `None`);
        ``submitted``, ``started`` (its last start) and ``ended`` (when it left the queue) in Unix seconds, or `None`;
        ``run_seconds``, of the runs that are over, ``starts`` and ``evictions``; ``peak_memory`` and
        ``requested_memory`` in bytes, ``requested_cpus``; ``exit_code`` and ``exit_signal``, or `None`;
        ``hold_reason``, in HTCondor's words where it is held now, else empty; ``category`` (a value of `Category`, or
        `None`), ``summary`` and ``remedy`` of the diagnosis, and ``reason``, all of that in one text; ``asked_for``.
    """
    return {
        "kind": "job",
        "what": what,
        "job_id": record.job_id,
        "group": group,
        "state": record.state.value,
        "host": record.host,
        "submitted": record.submitted or None,
        "started": record.last_start,
        "ended": record.ended,
        "run_seconds": record.run_seconds,
        "starts": record.starts,
        "evictions": record.evictions,
        "peak_memory": int(record.memory_mib * MIB) if record.memory_mib else None,
        "requested_memory": spec.memory,
        "requested_cpus": spec.cpus,
        "exit_code": record.exit_code,
        "exit_signal": record.exit_signal,
        "hold_reason": record.reason if record.state is JobState.HELD else "",
        "category": diagnosis.category.value if diagnosis else None,
        "summary": diagnosis.summary if diagnosis else "",
        "remedy": diagnosis.remedy if diagnosis else "",
        "reason": str(diagnosis) if diagnosis else reason,
        "asked_for": asked_for,
    }
