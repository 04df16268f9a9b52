"""Where the logs and, while it lives, the staged files of a cluster are, how long they are kept, and whose they are."""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import platformdirs
import psutil

from prefect_htcdask.condor import own_files
from prefect_htcdask.condor.own_files import MARK_FILE, Known, OwnDirectory, clock_of
from prefect_htcdask.condor.staging import EVENT_LOG, FAILURES_FILE, LOGS, STAGED, STAGING, SUPERVISOR_LOG, WORKER_LOG
from prefect_htcdask.condor.submit_description import FlowRunTag, cluster_digest
from prefect_htcdask.settings import HTCDaskSettings
from prefect_htcdask.supervisor.report.markdown import FILES as REPORT_FILES
from prefect_htcdask.utils.private_file import write_private

logger = logging.getLogger(__name__)

_SURELY_DEAD = 3600.0
"""Seconds without a sign of life; renewals are at most ten minutes apart."""

_RECORD = "cluster.json"
_EARLY_LOG = r"supervisor-[0-9a-f]{12}\.log"

_KNOWN = Known(
    re.compile(
        "|".join(map(re.escape, (MARK_FILE, _RECORD, EVENT_LOG, SUPERVISOR_LOG, FAILURES_FILE, *REPORT_FILES)))
        + rf"|\.{re.escape(_RECORD)}\.\d+|{_EARLY_LOG}"
    ),
    ((re.compile(STAGING), STAGED), (re.compile(LOGS), Known(WORKER_LOG))),
)
"""What of a run directory is ours."""


def run_directory(settings: HTCDaskSettings, name: str) -> Path:
    """The directory of a cluster, by the digest of its name, or another entry beside it."""
    base = settings.condor.directory
    root = Path(base) if base else Path(platformdirs.user_state_dir("prefect-htcdask")) / "runs"
    return root / name


def cluster_directory(settings: HTCDaskSettings, cluster_name: str) -> Path:
    """The run directory of a gateway cluster: it has the digest of its name, since its path stands in job ads."""
    return run_directory(settings, cluster_digest(cluster_name))


def early_log(settings: HTCDaskSettings) -> Path:
    """A log for a supervisor that has no cluster yet; it moves into the cluster's directory later."""
    return run_directory(settings, f"supervisor-{uuid.uuid4().hex[:12]}.log")


def prune(directory: Path, keep: float, lease: float = 0.0) -> None:
    """Delete what clusters left in `directory` more than `keep` seconds ago, and staged secrets of dead ones sooner.

    The directory may hold anything beside them: only a directory of this user's that our mark or record names is a
    cluster's, and only files of names that we give are deleted in it (`condor.own_files`). The newest file in it tells
    its age, by the clock of the file system. A cluster whose supervisor or flow's process lives is left alone whatever
    the clock says; a supervisor touches its directory at each renewal of the lease, for those that look from another
    host.

    Args:
        directory: the directory of all clusters.
        keep: seconds that logs are kept.
        lease: seconds that a cluster lives without a renewal.
    """
    try:
        now = clock_of(directory)
        entries = sorted(directory.iterdir())
    except OSError:
        return
    for entry in entries:
        with suppress(OSError):
            if re.fullmatch(_EARLY_LOG, entry.name):
                _prune_log(entry, now - max(keep, _SURELY_DEAD))
            elif now - entry.stat(follow_symlinks=False).st_mtime > max(_SURELY_DEAD, 2 * lease):
                _prune_cluster(entry, now, keep, lease)


def _prune_log(path: Path, before: float) -> None:
    """Delete the log of a supervisor that never had a cluster."""
    status = path.stat(follow_symlinks=False)
    if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_mtime < before:
        path.unlink()


def _prune_cluster(path: Path, now: float, keep: float, lease: float) -> None:
    with OwnDirectory.opened(path) as own:
        record = _record_in(own.text(_RECORD), path.name)
        if not own.is_marked() and record is None:
            return
        age = now - own.newest()
        alive = max(_SURELY_DEAD, 2 * lease, 2 * record.lease if record else 0.0)
        if age <= alive or own.is_held() or (record is not None and record.process_lives()):
            return
        if age <= keep:
            own.remove_below(STAGING, STAGED)
            return
        empty = own.remove(_KNOWN)
    if empty:
        path.rmdir()
    logger.info("deleted the logs of an old cluster in %s%s", path, "" if empty else ", and kept what is not ours")


@dataclass(frozen=True)
class ClusterRecord:
    """Which flow run a gateway cluster was started for, and by which process: no gateway can tell that.

    Attributes:
        cluster: digest of the gateway cluster's name (`cluster_digest`).
        flow_run_id: id of the flow run (UUID as text).
        flow_run_name: its name.
        attempt: its run count, from 1.
        api_url: the Prefect API that knows it (`FlowRunTag.api`); empty where that was not known.
        lease: seconds that its jobs live without a renewal.
        host: where process ids mean what they meant: host, boot and process namespace.
        pid: id of the flow's process.
        started: when that process started, Unix time in seconds.
    """

    cluster: str
    flow_run_id: str
    flow_run_name: str
    attempt: int
    api_url: str
    lease: float
    host: str
    pid: int
    started: float

    def process_lives(self) -> bool | None:
        """Whether the flow's process lives; `None` where that cannot be told from here."""
        if self.host != _this_host():
            return None
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 2 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return None


@dataclass(frozen=True)
class ClusterTrace:
    """What the run directory of a cluster tells.

    Attributes:
        cluster: digest of the gateway cluster's name (`cluster_digest`).
        last_sign: when it was last renewed, or its logs written, Unix time in seconds.
        record: whose it is, or `None` where no record says so.
    """

    cluster: str
    last_sign: float
    record: ClusterRecord | None


def record_cluster(directory: Path, flow_run: FlowRunTag, *, lease: float) -> None:
    """Write down that this process has a gateway cluster for a flow run, so that what is left of it can be found.

    Args:
        directory: the cluster's run directory (`cluster_directory`); made if needed with mode 0700.
        flow_run: the flow run.
        lease: seconds that its jobs live without a renewal.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    own_files.mark(directory)
    record = ClusterRecord(
        cluster=directory.name,
        flow_run_id=flow_run.id,
        flow_run_name=flow_run.name,
        attempt=flow_run.attempt,
        api_url=flow_run.api,
        lease=lease,
        host=_this_host(),
        pid=os.getpid(),
        started=psutil.Process().create_time(),
    )
    write_private(directory / _RECORD, json.dumps(asdict(record)))


def cluster_traces(settings: HTCDaskSettings, since: float) -> list[ClusterTrace]:
    """The run directories of this user's clusters that gave a sign since a Unix time, newest first."""
    return sorted(_traces(run_directory(settings, ""), since), key=lambda trace: -trace.last_sign)


def _traces(root: Path, since: float) -> Iterator[ClusterTrace]:
    with suppress(FileNotFoundError, NotADirectoryError):
        for entry in root.iterdir():
            try:
                status = entry.stat(follow_symlinks=False)
                # A directory may be shared: what others write there is no word of ours.
                if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mtime < since:
                    continue
                yield ClusterTrace(entry.name, status.st_mtime, _read_record(entry))
            except OSError:
                continue


def _read_record(directory: Path) -> ClusterRecord | None:
    try:
        return _record_in((directory / _RECORD).read_text(), directory.name)
    except (FileNotFoundError, ValueError):
        return None


def _record_in(text: str, name: str) -> ClusterRecord | None:
    """The record in a text, if it is that of the cluster whose directory has this name."""
    try:
        record = ClusterRecord(**json.loads(text))
    except (ValueError, TypeError):
        return None
    return record if record.cluster == name else None


def failures_in(directory: Path) -> list[dict[str, Any]]:
    """What the supervisor of a cluster wrote down of its jobs that failed; see `condor.staging.RunDirectory`."""
    found = []
    with suppress(OSError):
        for line in (directory / FAILURES_FILE).read_text(errors="replace").splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    return [told for told in found if isinstance(told, dict) and "job_id" in told]


def _this_host() -> str:
    parts = [os.uname().nodename]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)
