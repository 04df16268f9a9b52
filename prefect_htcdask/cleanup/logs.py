"""The logs of worker jobs that have come back, of a flow run or of one job, however long it is over."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefect_htcdask.condor.staging import WORKER_LOG
from prefect_htcdask.gateway.run_directory import ClusterTrace, cluster_traces, run_directory
from prefect_htcdask.settings import HTCDaskSettings


@dataclass(frozen=True)
class WorkerLog:
    """What one worker job wrote.

    Attributes:
        job_id: ``cluster.proc``.
        cluster: digest of the gateway cluster's name (`cluster_digest`), which its directory has as its name.
        path: the file.
        text: its content; bytes that are no UTF-8 are replaced.
    """

    job_id: str
    cluster: str
    path: str
    text: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def worker_logs(settings: HTCDaskSettings, wanted: str) -> list[WorkerLog]:
    """The logs of a worker job, or of all jobs of a flow run, oldest first; those that are empty are left out.

    They are kept for `condor.keep_logs`. Where the schedd sees this host's files, a worker's stderr comes as it is
    written; else it comes back when the worker has ended by itself.

    Args:
        settings: where the run directories are.
        wanted: a job id, ``cluster.proc``, or the id of a flow run. A job id that several schedds gave is the latest.
    """
    traces = cluster_traces(settings, since=0)
    if re.fullmatch(r"\d+\.\d+", wanted):
        found = ([log for log in _logs_of(settings, trace) if log.job_id == wanted] for trace in traces)
        return next((logs for logs in found if logs), [])
    of_flow_run = [trace for trace in traces if trace.record is not None and trace.record.flow_run_id == wanted]
    return [log for trace in reversed(of_flow_run) for log in _logs_of(settings, trace)]


def _logs_of(settings: HTCDaskSettings, trace: ClusterTrace) -> Iterator[WorkerLog]:
    directory = run_directory(settings, trace.cluster) / "logs"
    for number, path in sorted(_files(directory)):
        with suppress(OSError):
            text = path.read_text(errors="replace")
            if text:
                yield WorkerLog(".".join(map(str, number)), trace.cluster, str(path), text)


def _files(directory: Path) -> Iterator[tuple[tuple[int, int], Path]]:
    with suppress(OSError):
        for path in directory.iterdir():
            if match := WORKER_LOG.fullmatch(path.name):
                yield (int(match[1]), int(match[2])), path
