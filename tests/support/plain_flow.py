"""A flow on HTCondor workers, started by plain ``python flow.py``, to be killed with all that looks after it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from prefect_htcdask.runner.states.reporter import UNFINISHED

SCRIPT = """
    import json, os, sys, time
    from pathlib import Path
    from prefect import flow, task
    from prefect.runtime import flow_run
    from prefect_htcdask import HTCDaskTaskRunner
    from prefect_htcdask.runner import flow_run as sessions
    from prefect_htcdask.gateway.run_directory import record_cluster

    @task
    def sleepy(path, number):
        Path(f"{path}.{number}").touch()
        time.sleep(300)

    @flow(task_runner=HTCDaskTaskRunner(worker={"memory": "300 MiB", "disk": "100 MiB", "nthreads": 2},
                                        adapt_kwargs={"minimum": 1, "maximum": 1}))
    def computing(path):
        futures = [sleepy.submit(path, number) for number in range(4)]
        while len(list(Path(path).parent.glob(Path(path).name + ".?"))) < 2:
            time.sleep(0.1)
        cluster = sessions.find(str(flow_run.id)).cluster
        if "--record" in sys.argv:
            record_cluster(cluster.run_directory, cluster.flow_run, lease=180.0)
        print(json.dumps([str(flow_run.id), cluster.name, cluster._supervisor.pid]), flush=True)
        futures[0].result()

    computing(sys.argv[1])
"""


class PlainFlow:
    """A flow started by plain ``python flow.py``, which tells of itself once its first task runs."""

    def __init__(
        self, directory: Path, name: str, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> None:
        script = directory / "script.py"
        script.write_text(textwrap.dedent(SCRIPT))
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(directory / name), *arguments],
            cwd=directory,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=(directory / f"{name}.log").open("wb"),
            text=True,
        )
        self.log = directory / f"{name}.log"

    def wait_until_it_computes(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        while line and not line.startswith("["):
            line = self.process.stdout.readline()
        assert line, self.log.read_text()
        self.flow_run_id, self.cluster, self.supervisor = json.loads(line)

    def kill_all(self) -> None:
        """The flow's process and its supervisor, before either can notice."""
        os.kill(self.supervisor, signal.SIGSTOP)
        self.process.kill()
        os.kill(self.supervisor, signal.SIGKILL)
        self.process.wait(10)

    def end(self) -> None:
        """End what a test that failed left of it."""
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait(10)


def unfinished(api: SyncPrefectClient, flow_run_id: str) -> list[str]:
    """Names of a flow run's task runs that have not ended."""
    runs = api.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[uuid.UUID(flow_run_id)])))
    return [task_run.name for task_run in runs if task_run.state_type in UNFINISHED]
