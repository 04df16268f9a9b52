"""What workers wrote: in their flow run's log at a real server, and by ``prefect-htcdask jobs --logs``."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

import htcondor2
import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.runtime import flow_run as flow_run_runtime

from prefect_htcdask import HTCDaskTaskRunner
from prefect_htcdask.cleanup.logs import worker_logs
from prefect_htcdask.condor.schedd import ScheddClient
from prefect_htcdask.embedded import EmbeddedEndpoint
from prefect_htcdask.settings import HTCDaskSettings
from tests.support.cluster_fixtures import SMALL, jobs_of
from tests.support.command_line import run
from tests.support.prefect_fixtures import PrefectServer
from tests.support.waiting import wait_until


def log_of(flow_run_id: str) -> list[str]:
    """The flow run's log at the API."""
    with get_client(sync_client=True) as client:
        logs = client.read_logs(log_filter=LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id])))
    return [log.message for log in sorted(logs, key=lambda log: log.timestamp)]


@task
def warn(secret: str) -> None:
    """What Dask itself does on a worker, now and then."""
    logging.getLogger("distributed.worker").warning("unmanaged memory use is high; the key is %s", secret)


@task
def hold_on(directory: str, number: int) -> int:
    """Run until a file is there."""
    path = Path(directory)
    (path / f"runs-{number}").touch()
    wait_until((path / "go").exists, 120, "the word to go on")
    return number


@task
def die(directory: str) -> str:
    """Take the worker's process along, the first time."""
    import os
    import sys

    died = Path(directory) / "died"
    if not died.exists():
        died.touch()
        print("the detector is on fire", file=sys.stderr, flush=True)
        os._exit(3)
    return "alive"


@pytest.mark.timeout(300)
def test_what_workers_say_is_in_the_flow_run_s_log(
    prefect_api: PrefectServer,
    condor_environment: EmbeddedEndpoint,
    queue: ScheddClient,
    tmp_path: Path,
) -> None:
    @flow(task_runner=HTCDaskTaskRunner(cluster_kwargs=SMALL, adapt_kwargs={"maximum": 1}))
    def analysis() -> tuple[str, str]:
        warn.submit("nothing").wait()
        future = hold_on.submit(str(tmp_path), 1)
        wait_until((tmp_path / "runs-1").exists, 60, "the task on a worker")
        (job,) = jobs_of(queue)
        assert queue.locate().act(htcondor2.JobAction.Vacate, [job])["TotalSuccess"] == 1
        flow_run_id = str(flow_run_runtime.id)
        wait_until(lambda: [line for line in log_of(flow_run_id) if "told to leave" in line], 60, "its last words")
        (tmp_path / "go").touch()
        assert future.result() == 1
        assert die.submit(str(tmp_path)).result() == "alive"
        return flow_run_id, job

    flow_run_id, evicted = analysis()
    lines = log_of(flow_run_id)
    (warned,) = [line for line in lines if "unmanaged memory" in line]
    assert warned.startswith(f"HTCondor job {evicted} on ")
    (left,) = [line for line in lines if "told to leave" in line]
    assert left.startswith(f"HTCondor job {evicted} on ") and "handed back: hold_on" in left
    assert any("exit status 3" in line and "the detector is on fire" in line for line in lines)

    # All of it can be had when the flow run is over.
    shown = run("jobs", "--logs", flow_run_id)
    assert shown.returncode == 0 and "the detector is on fire" in shown.stdout
    (dead,) = {log["job_id"] for log in json.loads(run("jobs", "--logs", flow_run_id, "--json").stdout)
               if "the detector is on fire" in log["text"]}  # fmt: skip
    of_job = run("jobs", "--logs", dead)
    assert of_job.returncode == 0 and f"==> HTCondor job {dead}: " in of_job.stdout
    # HTCondor itself brings nothing back of a job that is evicted.
    assert "the worker was told to leave; handed back: hold_on" in run("jobs", "--logs", evicted).stdout
    assert "the detector is on fire" in of_job.stdout


def test_logs_that_are_not_there(tmp_path: Path) -> None:
    place = {"PREFECT_INTEGRATIONS_HTCDASK_CONDOR_DIRECTORY": str(tmp_path)}
    none = run("jobs", "--logs", "7.0", **place)
    assert none.returncode == 1 and "there is no log of 7.0" in none.stderr and "condor.keep_logs" in none.stderr
    none = run("jobs", "--logs", "7.0", "--json", **place)
    assert (none.returncode, none.stdout) == (1, "[]\n")


def test_the_latest_job_of_that_id_is_meant(tmp_path: Path) -> None:
    settings = HTCDaskSettings(condor={"directory": str(tmp_path)})
    for age, cluster in ((100, "old"), (10, "new")):
        logs = tmp_path / cluster / "logs"
        logs.mkdir(parents=True)
        for job in ("7.0", "7.10", "7.2"):
            (logs / f"worker.{job}.err").write_text(f"{cluster} {job}")
        (logs / "worker.8.0.out").write_text("")
        (logs / "notes").write_text("not a log")
        when = time.time() - age
        os.utime(tmp_path / cluster, (when, when))
    assert [log.text for log in worker_logs(settings, "7.0")] == ["new 7.0"]
    assert worker_logs(settings, "8.0") == [] and worker_logs(settings, "9.0") == []
    assert worker_logs(settings, "no-such-flow-run") == []
