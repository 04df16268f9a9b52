"""The pool, gateway and Prefect server that rows break, and hands to break them with."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from prefect.client.base import PrefectHttpxSyncClient

from prefect_htcdask.embedded import EmbeddedEndpoint, status
from prefect_htcdask.embedded.condor_binaries import condor_binaries
from prefect_htcdask.settings import ENV_PREFIX, EmbeddedSettings
from tests.support import faketime
from tests.support.waiting import wait_until
from tools.prefect_server import PrefectServer


class Unknown(RuntimeError):
    """A daemon could not be asked: its state is not known, which is not the same as empty."""


@dataclass
class Arena:
    """One private pool and gateway.

    Attributes:
        settings: where they are.
        endpoint: how to reach them.
        server: the Prefect server that flows use.
        directory: for the files of flows.
        login: "user:password" of the Prefect server, where it asks for one.
    """

    settings: EmbeddedSettings
    endpoint: EmbeddedEndpoint
    server: PrefectServer
    directory: Path
    login: str | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a flow's process needs to find all of it, with small workers and a log of its own."""
        return {
            **os.environ,
            **self.server.environment,
            f"{ENV_PREFIX}EMBEDDED_DIRECTORY": str(self.endpoint.directory),
            f"{ENV_PREFIX}EMBEDDED_USE_CONFIGURED_POOL": "false",
            f"{ENV_PREFIX}CONDOR_DIRECTORY": str(self.runs),
            f"{ENV_PREFIX}WORKER_MEMORY": "300 MiB",
            f"{ENV_PREFIX}WORKER_DISK": "100 MiB",
        }

    @property
    def runs(self) -> Path:
        """Where clusters keep their logs and staged files."""
        return self.directory / "runs"

    def condor(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one of HTCondor's own commands, as an operator or another user's script would."""
        release = condor_binaries(lambda _text: None).release
        path = f"{release / 'bin'}:{release / 'sbin'}:{os.environ['PATH']}"
        environment = {**os.environ, "CONDOR_CONFIG": str(self.endpoint.condor_config), "PATH": path}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        if check and done.returncode != 0:
            raise Unknown(f"{shlex.join(command)}: {done.stdout}{done.stderr}")
        return done

    def jobs(self, *attributes: str) -> list[dict[str, Any]]:
        """The jobs in the queue, in any state and of anybody.

        Raises:
            Unknown: the schedd does not answer.
        """
        wanted = ",".join(["ClusterId", "ProcId", "JobStatus", "HTCDaskClusterName", *attributes])
        text = self.condor("condor_q", "-allusers", "-json", "-attributes", wanted).stdout
        found: list[dict[str, Any]] = json.loads(text) if text.strip() else []
        return found

    def job_ids(self, status_code: int | None = None) -> list[str]:
        """Ids of the jobs in the queue; of those in one JobStatus only, if given."""
        return [
            f"{job['ClusterId']}.{job['ProcId']}"
            for job in self.jobs()
            if status_code is None or job["JobStatus"] == status_code
        ]

    def edit_jobs(self, attribute: str, value: str) -> None:
        """Change an attribute of all jobs, and have their shadows hear of it, which condor_qedit does not."""
        code = (
            "import sys, htcondor2;"
            "htcondor2.Schedd().edit('true', sys.argv[1], sys.argv[2], flags=htcondor2.TransactionFlag.SetDirty)"
        )
        self.condor(sys.executable, "-c", code, attribute, value)

    def clusters(self) -> list[str]:
        """Names of the gateway's clusters.

        Raises:
            Unknown: the gateway does not answer.
        """
        login = (self.endpoint.username, self.endpoint.password)
        try:
            answer = httpx.get(f"{self.endpoint.gateway_address}/api/v1/clusters/", auth=login, timeout=60)
            return sorted(answer.raise_for_status().json())
        except httpx.HTTPError as exc:
            raise Unknown(f"the gateway: {exc!r}") from exc

    def pid_of(self, service: str) -> int:
        """Process id of the keeper's child: condor, gateway or proxy."""
        return int(wait_until(lambda: status(self.settings)["processes"].get(service), 30, f"{service} runs"))

    def daemon(self, name: str) -> psutil.Process:
        """A daemon of HTCondor, by its program's name."""
        for process in psutil.Process(self.pid_of("condor")).children(recursive=True):
            with suppress(psutil.Error):
                if process.name() == name:
                    return process
        raise Unknown(f"no {name} runs")

    def scheduler_of(self, cluster: str) -> psutil.Process:
        """The Dask scheduler of a gateway cluster."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                line = process.cmdline()
                if "distributed.cli.dask_scheduler" in line and cluster in process.cwd():
                    return process
        raise Unknown(f"no scheduler of {cluster} runs")

    @contextmanager
    def without(self, daemon: str) -> Iterator[None]:
        """Turn an HTCondor daemon off while the block lasts."""
        running = self.daemon(f"condor_{daemon}")
        self.condor("condor_off", "-daemon", daemon, "-fast")
        try:
            wait_until(lambda: not running.is_running(), 20, f"the {daemon} is down")
            yield
        finally:
            self.condor("condor_on", "-daemon", daemon)

    def set_clock(self, daemon: str, ahead: float) -> None:
        """Restart a daemon with a clock that is `ahead` seconds ahead (negative: behind), as those that it starts see.

        Once in a pool's life: HTCondor's sessions do not outlive such jumps.
        """
        words = " ".join(f"{name}={value}" for name, value in faketime.environment(ahead).items())
        with Path(self.endpoint.condor_config).open("a") as stream:
            stream.write(f'\n{daemon.upper()}_ENVIRONMENT = "{words}"\n')
        running = self.daemon(f"condor_{daemon}")
        self.condor("condor_reconfig")
        self.condor("condor_restart", "-daemon", daemon, "-fast")
        wait_until(lambda: not running.is_running() and self.answers(), 90, f"the {daemon} is back")

    def answers(self) -> bool:
        """Whether the schedd does."""
        try:
            self.job_ids()
        except Unknown:
            return False
        return True

    @contextmanager
    def configured(self, **settings: str) -> Iterator[None]:
        """Change the schedd's configuration while the block lasts."""
        path = Path(self.endpoint.condor_config)
        before = path.read_text()
        name = next(iter(settings))
        lines = [f"{name} = {value}" for name, value in settings.items()]
        try:
            self._configure("\n".join([before, *lines, ""]), lambda: self._schedd_has(name) == settings[name])
            yield
        finally:
            self._configure(before, lambda: self._schedd_has(name) != settings[name])

    def _configure(self, text: str, is_read: Callable[[], bool]) -> None:
        Path(self.endpoint.condor_config).write_text(text)
        self.condor("condor_reconfig", "-daemon", "schedd")
        wait_until(is_read, 30, "the schedd has read its configuration")

    def _schedd_has(self, name: str) -> str:
        return self.condor("condor_config_val", "-schedd", name, check=False).stdout.strip()

    def api(self) -> httpx.Client:
        """A plain client of the Prefect API, which asks again where a busy server answers 503, as Prefect's own do."""
        user, _, password = (self.login or "").partition(":")
        return PrefectHttpxSyncClient(
            base_url=self.server.url,
            timeout=120,
            auth=(user, password) if self.login else None,
            raise_on_all_errors=False,
        )

    def sweep(self) -> dict[str, Any]:
        """Run ``prefect-htcdask sweep``; returns its report."""
        command = [sys.executable, "-m", "prefect_htcdask.cli", "sweep", "--json"]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=600)
        if not done.stdout.strip():
            raise AssertionError(f"sweep: {done.stderr}")
        report: dict[str, Any] = json.loads(done.stdout)
        return report

    def is_well(self) -> bool:
        """Whether pool and gateway answer."""
        return bool(status(self.settings)["running"])

    def clear(self) -> None:
        """Remove what a row that failed left, so that it does not spoil the next one."""
        wait_until(self.is_well, 90, "pool and gateway are well again", pause=0.5)
        if self.job_ids():
            self.condor("condor_rm", "-all", check=False)
            time.sleep(2)
            # A shadow that has lost its host would look for it as long as the job's lease lasts.
            self.condor("condor_rm", "-forcex", "-all", check=False)
            wait_until(lambda: not self.job_ids(), 60, "no job left by the row", pause=0.5)
        for name in self.clusters():
            with suppress(Unknown, psutil.Error):
                self.scheduler_of(name).kill()
        wait_until(lambda: not self.clusters(), 60, "no gateway cluster left by the row", pause=0.5)


def kill(*processes: psutil.Process | int, number: signal.Signals = signal.SIGKILL) -> None:
    """Signal processes by their id; one that is gone is no matter."""
    for process in processes:
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            os.kill(process if isinstance(process, int) else process.pid, number)


def kill_at_once(processes: Sequence[psutil.Process | int]) -> None:
    """Kill processes before any of them can notice the end of another."""
    kill(*processes, number=signal.SIGSTOP)
    kill(*processes)
