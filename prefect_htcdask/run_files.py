"""Where the logs and, while it lives, the staged files of a cluster are, how long they are kept, and whose they are."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import platformdirs
import psutil

from .condor.staging import FAILURES_FILE
from .condor.worker_job import FlowRunTag, cluster_digest
from .settings import HTCDaskSettings

_SURELY_DEAD = 3600.0
"""Seconds without a sign of life; renewals are at most ten minutes apart."""

_RECORD = "cluster.json"


def run_directory(settings: HTCDaskSettings, name: str) -> Path:
    """The directory of a cluster, by the digest of its name, or another entry beside it."""
    base = settings.condor.directory
    root = Path(base).expanduser() if base else Path(platformdirs.user_state_dir("prefect-htcdask")) / "runs"
    return root / name


def cluster_directory(settings: HTCDaskSettings, cluster_name: str) -> Path:
    """The run directory of a gateway cluster: it has the digest of its name, since its path stands in job ads."""
    return run_directory(settings, cluster_digest(cluster_name))


def prune(directory: Path, keep: float, lease: float = 0.0) -> None:
    """Delete what clusters left in `directory` more than `keep` seconds ago, and staged secrets of dead ones sooner.

    A cluster's supervisor touches its directory at each renewal of the lease, so a living one is never old.

    Args:
        directory: the directory of all clusters.
        keep: seconds that logs are kept.
        lease: seconds that a cluster lives without a renewal.
    """
    now = time.time()
    alive = max(_SURELY_DEAD, 2 * lease)
    with suppress(OSError):
        for entry in directory.iterdir():
            with suppress(OSError):
                age = now - entry.stat().st_mtime
                if age > max(keep, alive):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
                elif age > alive and (entry / "staging").is_dir():
                    shutil.rmtree(entry / "staging")


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
    temporary = directory / f".{_RECORD}.{os.getpid()}"
    descriptor = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        json.dump(asdict(record), stream)
    temporary.replace(directory / _RECORD)


def cluster_traces(settings: HTCDaskSettings, since: float) -> list[ClusterTrace]:
    """The run directories of this user's clusters that gave a sign since a Unix time, newest first."""
    return sorted(_traces(run_directory(settings, ""), since), key=lambda trace: -trace.last_sign)


def _traces(root: Path, since: float) -> Iterator[ClusterTrace]:
    with suppress(FileNotFoundError, NotADirectoryError):
        for entry in root.iterdir():
            try:
                status = entry.stat()
                # A directory may be shared: what others write there is no word of ours.
                if not entry.is_dir() or status.st_uid != os.getuid() or status.st_mtime < since:
                    continue
                yield ClusterTrace(entry.name, status.st_mtime, _read_record(entry))
            except OSError:
                continue


def _read_record(directory: Path) -> ClusterRecord | None:
    try:
        record = ClusterRecord(**json.loads((directory / _RECORD).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return record if record.cluster == directory.name else None


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
