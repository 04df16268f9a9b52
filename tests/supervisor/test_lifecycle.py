"""No worker outlives its flow: what is left after kills, evictions and ends of all kinds, on the real pool."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import htcondor2
import psutil
import pytest

from prefect_htcdask.condor.schedd import ScheddClient
from prefect_htcdask.condor.submit_description import FlowRunTag
from prefect_htcdask.embedded import EmbeddedEndpoint
from prefect_htcdask.gateway import HTCGatewayCluster
from tests.support.cluster_fixtures import SMALL, Stopwatch, gateway_clusters, jobs_named, jobs_of, texts
from tests.support.waiting import wait_until

pytestmark = pytest.mark.pool

NewCluster = Callable[..., HTCGatewayCluster]
LEASES = ("PREFECT_INTEGRATIONS_HTCDASK_LEASE_DURATION", "PREFECT_INTEGRATIONS_HTCDASK_LEASE_SCHEDULER")


class Script:
    """Another process with a cluster: it tells name and supervisor, then does what `then` says."""

    def __init__(self, then: str, workers: int = 2) -> None:
        code = f"""
            import os, sys, time
            from prefect_htcdask import HTCGatewayCluster

            cluster = HTCGatewayCluster(n_workers={workers}, **{SMALL!r})
            client = cluster.get_client()
            client.wait_for_workers({workers}, timeout=60)
            task = client.submit(time.sleep, 300)
            print(cluster.name, cluster._supervisor.pid, cluster.run_directory, flush=True)
        """
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code) + textwrap.dedent(then)], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        assert words, "the script ended early"
        self.name, self.supervisor, self.directory = words[0], int(words[1]), Path(words[2])


@pytest.fixture
def script(condor_environment: EmbeddedEndpoint) -> Iterator[Callable[..., Script]]:
    made: list[Script] = []

    def make(*arguments: Any, **more: Any) -> Script:
        made.append(Script(*arguments, **more))
        return made[-1]

    yield make
    for one in made:
        one.process.kill()
        one.process.wait()


def dead(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_a_killed_flow_leaves_nothing(
    script: Callable[..., Script], queue: ScheddClient, condor_environment: EmbeddedEndpoint
) -> None:
    # A forked child of user code holds both pipes of the supervisor open, and reads nothing.
    flow = script(
        """
        child = os.fork()
        if child == 0:
            time.sleep(120)
            os._exit(0)
        print(child, flush=True)
        time.sleep(300)
        """
    )
    assert flow.process.stdout is not None
    child = int(flow.process.stdout.readline())
    try:
        assert len(jobs_of(queue, flow.name)) == 2
        watch = Stopwatch()
        flow.process.kill()
        wait_until(lambda: jobs_of(queue, flow.name) == [], 15, "no job left")
        jobs_gone = watch()
        wait_until(lambda: flow.name not in gateway_clusters(condor_environment), 15 - watch(), "no gateway cluster")
        print(f"flow killed: jobs gone after {jobs_gone:.1f} s, gateway cluster after {watch():.1f} s")
        wait_until(lambda: dead(flow.supervisor), 15, "the supervisor ended too")
        assert not (flow.directory / "staging").exists()
    finally:
        kill(child)


@pytest.mark.parametrize("later", [0.0, 0.3, 0.8])
def test_a_flow_killed_while_its_cluster_starts_leaves_nothing(
    condor_environment: EmbeddedEndpoint, later: float
) -> None:
    before = set(gateway_clusters(condor_environment))
    flow = subprocess.Popen(
        [sys.executable, "-c", "from prefect_htcdask import HTCGatewayCluster\nHTCGatewayCluster(memory='300 MiB')"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        (name,) = wait_until(lambda: set(gateway_clusters(condor_environment)) - before, 30, "the gateway starts one")
        # The moment is the point, not something waited for: the start takes about one second.
        time.sleep(later)
    finally:
        flow.kill()
        flow.wait(10)
    wait_until(lambda: name not in gateway_clusters(condor_environment), 15, "the gateway cluster is stopped")


def test_jobs_live_by_their_lease(
    script: Callable[..., Script],
    queue: ScheddClient,
    condor_environment: EmbeddedEndpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lease = 8
    for name in LEASES:
        monkeypatch.setenv(name, f"{lease} s")
    flow = script("time.sleep(300)", workers=1)
    constraint = jobs_named(flow.name)
    (before,) = queue.query(constraint)
    # Renewed over two lease times, the same job runs on.
    wait_until(lambda: time.time() > before["JobCurrentStartDate"] + 2 * lease + 2, 60, "two lease times")
    (after,) = queue.query(constraint)
    assert after["JobStatus"] == 2
    assert (after["ClusterId"], after["NumJobStarts"]) == (before["ClusterId"], before["NumJobStarts"])
    assert after["HTCDaskLeaseExpires"] > before["HTCDaskLeaseExpires"] + lease
    # Nobody renews it any more.
    watch = Stopwatch()
    kill(flow.supervisor)
    flow.process.kill()
    wait_until(lambda: jobs_of(queue, flow.name) == [], lease + 15, "no job left")
    jobs_gone = watch()
    wait_until(lambda: flow.name not in gateway_clusters(condor_environment), lease + 15, "no gateway cluster")
    print(f"all killed, lease {lease} s: jobs gone after {jobs_gone:.1f} s, gateway cluster after {watch():.1f} s")
    (ad,) = queue.history(constraint, ["RemoveReason", "LastRemoteHost"], 1)
    # The scheduler may have ended first, and its workers with it.
    assert "lease" in str(ad.get("RemoveReason", "lease"))


def test_a_killed_supervisor_is_replaced(
    new_cluster: NewCluster, queue: ScheddClient, messages: list[dict[str, Any]]
) -> None:
    cluster = new_cluster(n_workers=1)
    with cluster.get_client() as client:
        client.wait_for_workers(1, timeout=60)
        jobs = jobs_of(queue, cluster.name)
        handle = cluster._supervisor
        assert handle is not None
        lost = handle.pid
        kill(lost)
        watch = Stopwatch()
        # Asked while nobody is there: the successor gets it.
        cluster.scale(2)
        print(f"supervisor killed: the next one obeyed after {watch():.1f} s")
        assert handle.pid != lost
        client.wait_for_workers(2, timeout=60)
        now = jobs_of(queue, cluster.name)
        assert len(now) == 2 and set(jobs) < set(now)
        # Killed again on its way to close: a third one does it.
        handle._process.send_signal(signal.SIGSTOP)
        timer = subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(1); os.kill({handle.pid}, 9)"])
    cluster.close()
    timer.wait()
    wait_until(lambda: jobs_of(queue, cluster.name) == [], 15, "no job left")
    assert texts(messages, "failed") == ""
    assert cluster.summary["jobs"] == 2


def test_a_process_that_just_ends_closes_its_cluster(
    script: Callable[..., Script], queue: ScheddClient, condor_environment: EmbeddedEndpoint
) -> None:
    flow = script("sys.exit(0)", workers=1)
    assert flow.process.wait(40) == 0
    wait_until(lambda: jobs_of(queue, flow.name) == [], 15, "no job left")
    wait_until(lambda: flow.name not in gateway_clusters(condor_environment), 10, "no gateway cluster")


def test_an_evicted_worker_s_task_runs_again_elsewhere(
    new_cluster: NewCluster, queue: ScheddClient, tmp_path: Path, messages: list[dict[str, Any]]
) -> None:
    def where(path: str) -> str:
        import time
        from pathlib import Path

        from distributed import get_worker

        with open(path, "a") as stream:
            stream.write(f"{get_worker().name}\n")
        while not Path(path + ".go").exists():
            time.sleep(0.05)
        return str(get_worker().name)

    def suspicion(dask_scheduler: Any) -> list[int]:
        return [task.suspicious for task in dask_scheduler.tasks.values()]

    started = tmp_path / "started"
    with new_cluster(n_workers=2) as cluster, cluster.get_client() as client:
        client.wait_for_workers(2, timeout=60)
        future = client.submit(where, str(started))
        (first,) = wait_until(lambda: started.exists() and started.read_text().split(), 20, "the task runs")
        job = first.split("-")[1]
        schedd = queue.locate()
        watch = Stopwatch()
        assert schedd.act(htcondor2.JobAction.Vacate, [job])["TotalSuccess"] == 1
        runs = wait_until(lambda: (n := started.read_text().split())[1:] and n, 30, "the task runs again")
        print(f"vacated: the task ran again after {watch():.1f} s")
        assert runs[1] != first
        assert client.run_on_scheduler(suspicion) == [0]
        (tmp_path / "started.go").touch()
        assert future.result(timeout=20) == runs[-1]
        # A worker killed outright is replaced.

        def present() -> set[str]:
            return {worker["name"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()}

        # Not the evicted one, which ends anyway.
        wait_until(lambda: first not in (found := present()) and len(found) == 2, 60, "another one is in its place")
        pids = client.run(os.getpid)
        kill(next(iter(pids.values())))
        wait_until(
            lambda: len(set(client.run(os.getpid, on_error="ignore").values()) - set(pids.values())) == 1,
            60,
            "a new worker",
        )
        assert client.submit(lambda: 1).result(timeout=30) == 1
        # The new worker may be the evicted one's job, started again: then the reason comes after it.
        wait_until(lambda: "ended by signal SIGKILL" in texts(messages, "log"), 20, "the reason is told")


SECRET = "s3cr3t-of-the-flow"


def test_secrets_are_nowhere_to_be_read(
    new_cluster: NewCluster, queue: ScheddClient, condor_environment: EmbeddedEndpoint
) -> None:
    tag = FlowRunTag("0f1e", 'run "one"', "flow\\two", 3)

    def look() -> tuple[str | None, int, list[tuple[str, int]]]:
        import os
        from pathlib import Path

        sandbox = Path(os.environ["_CONDOR_SCRATCH_DIR"])
        return os.environ.get("THE_SECRET"), os.getpid(), [(p.name, p.stat().st_mode & 0o77) for p in sandbox.iterdir()]

    cluster = new_cluster(n_workers=1, flow_run=tag, worker_secrets={"THE_SECRET": SECRET}, environment={"A": "b c"})
    with cluster.get_client() as client:
        value, pid, files = client.submit(look).result(timeout=60)
        assert value == SECRET, "the worker has it"
        assert "worker_secrets.json" not in dict(files), "and read it once"
        assert dict(files)["dask.pem"] == 0
    (ad,) = queue.query(jobs_named(cluster.name))
    assert ad["PrefectFlowRunId"] == "0f1e"
    assert (ad["PrefectFlowName"], ad["JobBatchName"]) == ("flow\\two", 'run "one"')
    assert (ad["HTCDaskWorkerGroup"], ad["HTCDaskAttempt"]) == ("default", 3)
    assert ad["HTCDaskLeaseExpires"] > time.time()
    assert cluster._supervisor is not None
    key = cluster.security.tls_key.splitlines()[3]
    hidden = [SECRET, key, condor_environment.password]
    public = [str(ad)]
    for process in (psutil.Process(pid), psutil.Process(pid).parent(), psutil.Process(cluster._supervisor.pid)):
        assert process is not None
        public += [" ".join(process.cmdline()), Path(f"/proc/{process.pid}/environ").read_text(errors="replace")]
    public += [path.read_text(errors="replace") for path in cluster.run_directory.rglob("*.log")]
    public += [path.read_text(errors="replace") for path in (cluster.run_directory / "logs").iterdir()]
    for secret in hidden:
        assert not [text for text in public if secret in text]
    staging = cluster.run_directory / "staging"
    secret_files = {
        path.name for path in staging.rglob("*") if path.is_file() and SECRET in path.read_text(errors="replace")
    }
    assert secret_files == {"worker_secrets.json"}
    for path in [cluster.run_directory, staging, staging / "default"]:
        assert path.stat().st_mode & 0o777 == 0o700
    for name in ("worker_secrets.json", "dask.pem"):
        assert (staging / "default" / name).stat().st_mode & 0o777 == 0o600
    cluster.close()
    wait_until(lambda: not staging.exists(), 20, "the secrets are gone")


def test_nothing_is_left_open_in_the_flow_s_process(new_cluster: NewCluster) -> None:
    def once() -> None:
        cluster = new_cluster()
        cluster.close()

    once()
    process = psutil.Process()
    before = process.num_fds()
    for _ in range(3):
        once()
    wait_until(lambda: process.num_fds() <= before + 1, 10, f"as many files open as before, {before}")
    assert [child for child in process.children() if "prefect_htcdask.supervisor" in child.cmdline()] == []


def test_five_hundred_idle_jobs_are_gone_at_once(
    new_cluster: NewCluster, queue: ScheddClient, condor_environment: EmbeddedEndpoint
) -> None:
    cluster = new_cluster(requirements="false")
    watch = Stopwatch()
    cluster.scale(500)
    wait_until(lambda: len(jobs_of(queue, cluster.name)) == 500, 20, "500 jobs", pause=0.05)
    print(f"500 jobs in the queue after {watch():.2f} s")
    watch = Stopwatch()
    cluster.close()
    closed = watch()
    wait_until(lambda: jobs_of(queue, cluster.name) == [], 10, "no job left", pause=0.02)
    print(f"close() with 500 idle jobs took {closed:.2f} s, no job in the queue after {watch():.2f} s")
    assert watch() < 3
    assert cluster.summary["jobs"] == 500 and cluster.summary["left"] == 0
    assert cluster.name not in gateway_clusters(condor_environment)


def test_a_schedd_that_is_named_and_spools(
    new_cluster: NewCluster,
    queue: ScheddClient,
    condor_environment: EmbeddedEndpoint,
    monkeypatch: pytest.MonkeyPatch,
    messages: list[dict[str, Any]],
) -> None:
    config = str(condor_environment.condor_config)
    (ad,) = htcondor2.Collector().query(htcondor2.AdType.Schedd, projection=["Name"])
    prefix = "PREFECT_INTEGRATIONS_HTCDASK_CONDOR"
    monkeypatch.setenv(f"{prefix}_CONFIG_FILE", config)
    monkeypatch.setenv(f"{prefix}_COLLECTOR", str(htcondor2.param["COLLECTOR_HOST"]))
    monkeypatch.setenv(f"{prefix}_SCHEDD", str(ad["Name"]))
    monkeypatch.setenv(f"{prefix}_SPOOL", "true")
    with new_cluster(n_workers=1) as cluster, cluster.get_client() as client:
        assert client.submit(lambda: 4).result(timeout=60) == 4
        cluster.scale(2)
        client.wait_for_workers(2, timeout=60)
        name = cluster.name
        watch = Stopwatch()
    print(f"spooled jobs closed in {watch():.1f} s")
    assert watch() < 12
    assert jobs_of(queue, name) == []
    assert texts(messages, "failed") == ""
    assert "held" not in texts(messages, "log")
    assert cluster.summary["jobs"] == 2 and cluster.summary["held"] == 0
