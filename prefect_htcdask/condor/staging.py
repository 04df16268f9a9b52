"""The directory of a cluster on the submitting host: what its jobs take with them, and what comes back."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect_htcdask.condor import own_files
from prefect_htcdask.condor.own_files import Known, OwnDirectory
from prefect_htcdask.condor.submit_description import JobFiles
from prefect_htcdask.utils.private_file import write_private
from prefect_htcdask.worker import start

_START_SCRIPT = "htcdask_worker.py"
FAILURES_FILE = "failures.jsonl"
_MAX_FAILURES = 2**20
"""Bytes of failures that are written down at most."""

_TAIL = 64 * 1024
"""Bytes of a worker's stderr, the last, that are looked at."""

_STARTED = re.compile(
    "^"
    + re.escape(start.START_LINE)
    .replace(r"\{number\}", r"\d+")
    .replace(r"\{job\}", r"[\d.]+")
    .replace(r"\{host\}", ".+")
    + "$",
    re.MULTILINE,
)

# The configuration has the cluster's name, which opens the dashboard.
_SECRET_FILES = (start.SECRETS_FILE, start.KEY_FILE, start.CONFIG_FILE)


def _any_of(*names: str) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, names)))


STAGING = "staging"
LOGS = "logs"
EVENT_LOG = "jobs.log"
SUPERVISOR_LOG = "supervisor.log"

WORKER_LOG = re.compile(r"worker\.(\d+)\.(\d+)(?:\.\d+)?\.(?:err|out)")
"""Names of the files that workers write: with the job's id, and which of its starts where that is told."""

STAGED = Known(
    _any_of(start.PACKAGE_FILE, Path(start.PACKAGE_FILE).with_suffix(".part").name),
    (
        (
            re.compile(r"[A-Za-z0-9_-]{1,40}"),  # a worker group's name
            Known(_any_of(_START_SCRIPT, start.CONFIG_FILE, start.CERTIFICATE_FILE, *_SECRET_FILES)),
        ),
    ),
)
"""What of a staging directory is ours."""


class RunDirectory:
    """Files of one gateway cluster's workers: `staging` until the cluster closes, `logs` and the event log for longer.

    Args:
        path: the directory, made if needed with mode 0700.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.staging = path / STAGING
        self.logs = path / LOGS
        self.event_log = path / EVENT_LOG
        self._held: int | None = None

    def prepare(self) -> None:
        """Make the directories, readable by their owner only, and show that the cluster lives.

        Raises:
            OSError: one cannot be made, or what is there belongs to somebody else.
        """
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for directory in (self.path, self.staging, self.logs):
            with suppress(FileExistsError):
                directory.mkdir(mode=0o700)
            with OwnDirectory.opened(directory):
                directory.chmod(0o700)
        own_files.mark(self.path)
        if self._held is None:
            self._held = own_files.hold(self.path)
        # The schedd opens the log; our reader may come first.
        os.close(os.open(self.event_log, os.O_CREAT | os.O_WRONLY, 0o600))

    def stage(
        self,
        group: str,
        config: Mapping[str, Any],
        *,
        tls_cert: str,
        tls_key: str,
        secrets: Mapping[str, str],
        log_is_local: bool,
    ) -> JobFiles:
        """Write what the workers of a group take with them.

        Args:
            group: name of the worker group; each has a directory of its own.
            config: the worker's configuration, without secrets.
            tls_cert: the gateway cluster's certificate, PEM.
            tls_key: its key, PEM.
            secrets: environment variables that only the worker process may see.
            log_is_local: whether the schedd can write the job event log here.
        """
        directory = self.staging / group
        directory.mkdir(mode=0o700, exist_ok=True)
        package = self.staging / start.PACKAGE_FILE
        if not package.exists():
            zip_package(package)
        script = directory / _START_SCRIPT
        shutil.copyfile(start.__file__, script)
        write_private(directory / start.CONFIG_FILE, json.dumps(dict(config)))
        write_private(directory / start.SECRETS_FILE, json.dumps(dict(secrets)))
        write_private(directory / start.CERTIFICATE_FILE, tls_cert)
        write_private(directory / start.KEY_FILE, tls_key)
        names = (
            start.CONFIG_FILE,
            start.SECRETS_FILE,
            start.CERTIFICATE_FILE,
            start.KEY_FILE,
        )
        return JobFiles(
            directory=str(self.path),
            start_script=_START_SCRIPT,
            inputs=(str(script), str(package), *(str(directory / name) for name in names)),
            # HTCondor matches these against the names as given, so both forms stand here.
            secret_inputs=(*_SECRET_FILES, *(str(directory / name) for name in _SECRET_FILES)),
            event_log=str(self.event_log) if log_is_local else None,
        )

    def touch(self) -> None:
        """Show that the cluster lives: what is old is pruned (`run_directory.prune`)."""
        with suppress(OSError):
            os.utime(self.path)

    def clear_staging(self) -> None:
        """Delete what the jobs took with them, secrets first of all; the logs stay."""
        with suppress(OSError), OwnDirectory.opened(self.path) as own:
            own.remove_below(STAGING, STAGED)

    def note_failure(self, told: Mapping[str, Any]) -> None:
        """Write down that a job failed, for those who ask later; neither a full disk nor many failures matter.

        Args:
            told: what is known of it, for JSON.
        """
        path = self.path / FAILURES_FILE
        with suppress(OSError):
            descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
            with os.fdopen(descriptor, "a") as stream:
                if stream.tell() < _MAX_FAILURES:
                    stream.write(json.dumps({"time": time.time(), **told}) + "\n")

    def stderr_tail(self, job_id: str, lines: int = 20) -> list[str]:
        """Last lines that a worker wrote to stderr since its last start, as far as they came back."""
        try:
            with (self.logs / f"worker.{job_id}.err").open("rb") as stream:
                # A worker may have written gigabytes, and the supervisor has other work.
                size = stream.seek(0, os.SEEK_END)
                stream.seek(max(0, size - _TAIL))
                text = stream.read(_TAIL).decode(errors="replace")
        except OSError:
            return []
        text = _STARTED.split(text)[-1]
        whole = text.splitlines()[1:] if size > _TAIL else text.splitlines()
        return [line for line in whole if line.strip()][-lines:]


def zip_package(target: Path) -> None:
    """Pack this package into one zip, for workers whose environment has none."""
    root = Path(__file__).parents[1]
    temporary = target.with_suffix(".part")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        for source in sorted(root.rglob("*.py")):
            archive.write(source, source.relative_to(root.parent))
    temporary.replace(target)
