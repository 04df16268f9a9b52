"""Bad input: one clear error that names setting, value and remedy, and nothing left running."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import htcondor2
import pytest

from prefect_htcdask.condor.schedd import ScheddClient
from prefect_htcdask.embedded import EmbeddedEndpoint
from prefect_htcdask.embedded.ports import free_port
from prefect_htcdask.gateway import GatewayUnreachable, HTCGatewayCluster, SupervisorError, WorkerJobError
from prefect_htcdask.settings import SettingsError
from tests.support.cluster_fixtures import Stopwatch, gateway_clusters, jobs_named, jobs_of, texts
from tests.support.waiting import wait_until

pytestmark = pytest.mark.pool

NewCluster = Callable[..., HTCGatewayCluster]
PREFIX = "PREFECT_INTEGRATIONS_HTCDASK_"


@pytest.fixture
def explicit(condor_environment: EmbeddedEndpoint, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Names the session's gateway and pool by settings, as a site's user would; arguments change some of them."""
    endpoint = condor_environment

    def configure(**changes: str) -> None:
        values = {
            "GATEWAY_ADDRESS": endpoint.gateway_address,
            "GATEWAY_PROXY_ADDRESS": str(endpoint.proxy_address),
            "GATEWAY_USERNAME": endpoint.username,
            "GATEWAY_PASSWORD": endpoint.password,
            "CONDOR_CONFIG_FILE": str(endpoint.condor_config),
            "EMBEDDED_ENABLED": "false",
            **changes,
        }
        for name, value in values.items():
            monkeypatch.setenv(PREFIX + name, value)

    return configure


@pytest.fixture(autouse=True)
def nothing_left(condor_environment: EmbeddedEndpoint, queue: ScheddClient) -> Any:
    yield
    wait_until(lambda: jobs_of(queue) == [], 15, "no job in the queue")
    wait_until(lambda: gateway_clusters(condor_environment) == [], 15, "no gateway cluster")


def refuse(error: type[Exception], *words: str, new_cluster: NewCluster, **arguments: Any) -> None:
    watch = Stopwatch()
    with pytest.raises(error) as caught:
        new_cluster(**arguments)
    text = str(caught.value)
    for word in words:
        assert word in text, text
    assert "\n" not in text, "one line"
    assert watch() < 40


def test_what_is_configured_works(explicit: Callable[..., None], new_cluster: NewCluster) -> None:
    """Else the refusals below might have another cause."""
    explicit()
    with new_cluster(n_workers=1) as cluster, cluster.get_client() as client:
        assert client.submit(lambda: 1).result(timeout=60) == 1


def test_a_gateway_that_is_not_there(explicit: Callable[..., None], new_cluster: NewCluster) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    explicit(GATEWAY_ADDRESS=address)
    refuse(GatewayUnreachable, "gateway.address", address, "is it running", new_cluster=new_cluster)


def test_a_gateway_that_is_none(explicit: Callable[..., None], new_cluster: NewCluster) -> None:
    explicit(GATEWAY_ADDRESS="localhost:8000")
    refuse(SettingsError, "gateway.address", "localhost:8000", "http://", new_cluster=new_cluster)


def test_a_wrong_password(explicit: Callable[..., None], new_cluster: NewCluster) -> None:
    explicit(GATEWAY_PASSWORD="guess")
    refuse(GatewayUnreachable, "gateway.address", "login", "gateway.password", new_cluster=new_cluster)


def test_a_schedd_that_is_not_there(explicit: Callable[..., None], new_cluster: NewCluster, tmp_path: Path) -> None:
    closed = f"127.0.0.1:{free_port()}"
    config = tmp_path / "condor_config"
    config.write_text(f"COLLECTOR_HOST = {closed}\nSCHEDD_ADDRESS_FILE = {tmp_path}/none\nQUERY_TIMEOUT = 3\n")
    explicit(CONDOR_CONFIG_FILE=str(config))
    refuse(SupervisorError, "schedd", closed, "condor.config_file", new_cluster=new_cluster)


def test_a_collector_that_is_not_there(explicit: Callable[..., None], new_cluster: NewCluster) -> None:
    closed = f"127.0.0.1:{free_port()}"
    explicit(CONDOR_COLLECTOR=closed, CONDOR_SCHEDD="schedd@nowhere")
    refuse(SupervisorError, "schedd@nowhere", closed, "condor.collector", new_cluster=new_cluster)


def test_a_schedd_that_nobody_knows(explicit: Callable[..., None], new_cluster: NewCluster) -> None:
    collector = str(htcondor2.param["COLLECTOR_HOST"])
    explicit(CONDOR_COLLECTOR=collector, CONDOR_SCHEDD="schedd@nowhere")
    (ad,) = htcondor2.Collector().query(htcondor2.AdType.Schedd, projection=["Name"])
    words = ("condor.schedd = 'schedd@nowhere'", "knows no schedd of that name", str(ad["Name"]))
    refuse(SupervisorError, *words, new_cluster=new_cluster)


def test_a_configuration_that_cannot_be_read(explicit: Callable[..., None], new_cluster: NewCluster) -> None:
    explicit(CONDOR_CONFIG_FILE="/no/such/condor_config")
    refuse(SupervisorError, "condor.config_file = '/no/such/condor_config'", new_cluster=new_cluster)


def test_a_schedd_that_refuses_us(
    explicit: Callable[..., None], new_cluster: NewCluster, condor_environment: EmbeddedEndpoint, tmp_path: Path
) -> None:
    config = tmp_path / "condor_config"
    config.write_text(
        Path(str(condor_environment.condor_config)).read_text()
        + "\nSEC_CLIENT_AUTHENTICATION_METHODS = IDTOKENS\nSEC_DEFAULT_AUTHENTICATION_METHODS = IDTOKENS\n"
        + f"SEC_TOKEN_DIRECTORY = {tmp_path}\nSEC_CLIENT_AUTHENTICATION = REQUIRED\n"
    )
    explicit(CONDOR_CONFIG_FILE=str(config))
    refuse(SupervisorError, "schedd", "condor.", new_cluster=new_cluster)


@pytest.mark.parametrize(
    ("error", "arguments", "words"),
    [
        (SettingsError, {"memory": "lots"}, ["worker.memory", "'lots'", "2 GiB"]),
        (SettingsError, {"cpus": 0}, ["worker.cpus", "0"]),
        (SettingsError, {"container_image": "/no/such.sif"}, ["worker.container_image", "/no/such.sif", "docker://"]),
        ((SupervisorError, WorkerJobError), {"requirements": "Memory >"}, ["worker.requirements", "Memory >"]),
        ((SupervisorError, WorkerJobError), {"extra_submit": {"queue": "7"}}, ["worker.extra_submit", "queue"]),
        (
            (SupervisorError, WorkerJobError),
            {"extra_submit": {"+ProjectName": "cms physics"}},
            ["worker.extra_submit['+ProjectName'] = 'cms physics'", "a string needs quotes of its own"],
        ),
        (
            SupervisorError,
            {"extra_submit": {"x509userproxy": "/no/such/proxy"}},
            ["worker.extra_submit['x509userproxy'] = '/no/such/proxy'", "cannot be read"],
        ),
        (ValueError, {"n_workers": -2}, ["-2", "number of workers"]),
    ],
)
def test_a_worker_that_cannot_be(
    error: type[Exception], arguments: dict[str, Any], words: list[str], new_cluster: NewCluster
) -> None:
    refuse(error, *words, new_cluster=new_cluster, **arguments)


def test_an_option_that_the_gateway_does_not_have(new_cluster: NewCluster) -> None:
    refuse(Exception, "worker_colour", new_cluster=new_cluster, worker_colour="blue")


def interpreter(directory: Path, body: str) -> str:
    """A program in place of the workers' Python."""
    path = directory / "python"
    path.write_text(f"#!{sys.executable}\n" + textwrap.dedent(body))
    path.chmod(0o755)
    directory.chmod(0o755)
    return str(path)


def test_workers_that_die_at_once(new_cluster: NewCluster, tmp_path: Path, messages: list[dict[str, Any]]) -> None:
    python = interpreter(
        tmp_path,
        """
        import sys
        print("loading the site's libraries", file=sys.stderr)
        sys.exit("libcuda.so.1: cannot open shared object file")
        """,
    )
    cluster = new_cluster(n_workers=1, python=python)
    text = wait_until(lambda: texts(messages, "failed"), 60, "the end of patience")
    assert "3 workers in a row" in text
    assert "exit status 1" in text and "libcuda.so.1: cannot open shared object file" in text
    submitted = [message for message in messages if message["kind"] == "job" and message["what"] == "submitted"]
    assert len(submitted) == 3, "no more are submitted"
    cluster.close()


def test_versions_that_differ(new_cluster: NewCluster, tmp_path: Path, messages: list[dict[str, Any]]) -> None:
    # The real start script, in an interpreter that has another version of dask installed.
    site = tmp_path / "site" / "dask-2020.1.0.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: dask\nVersion: 2020.1.0\n")
    python = interpreter(
        tmp_path,
        f"""
        import os, sys
        os.environ["PYTHONPATH"] = {str(site.parent)!r}
        os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
        """,
    )
    cluster = new_cluster(n_workers=3, python=python)
    text = wait_until(lambda: texts(messages, "failed"), 60, "the end of patience")
    assert "versions differ" in text and "dask 2020.1.0 on the worker" in text and "worker.python" in text
    cluster.close()


def test_a_held_job(new_cluster: NewCluster, queue: ScheddClient, messages: list[dict[str, Any]]) -> None:
    cluster = new_cluster(requirements="false")
    cluster.scale(1)
    wait_until(lambda: len(jobs_of(queue, cluster.name)) == 1, 20, "a job")
    # The input is gone before the job starts: a real hold, with HTCondor's own reason.
    package = cluster.run_directory / "staging" / "prefect_htcdask.zip"
    package.unlink()
    queue.locate().edit(jobs_named(cluster.name), "Requirements", "true")
    wait_until(lambda: "held" in texts(messages, "log"), 40, "the hold in the log")
    text = texts(messages, "log")
    assert "prefect_htcdask.zip" in text and "condor.spool" in text and "code 13" in text
    cluster.close()


def test_a_job_that_someone_holds_is_kept(
    new_cluster: NewCluster, queue: ScheddClient, messages: list[dict[str, Any]]
) -> None:
    with new_cluster(requirements="false") as cluster:
        cluster.scale(1)
        (job,) = wait_until(lambda: jobs_of(queue, cluster.name), 20, "a job")
        queue.locate().act(htcondor2.JobAction.Hold, [job], ("by the test", 0))
        wait_until(lambda: "held" in texts(messages, "log"), 20, "the hold in the log")
        assert "by the test" in texts(messages, "log") and "condor_release" in texts(messages, "log")
        wait_until(lambda: len(jobs_of(queue, cluster.name)) == 2, 20, "another one in its place")
        assert job in jobs_of(queue, cluster.name)
    assert texts(messages, "failed") == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"cpus": 500}, ["0 of 1 slots have 500 cpus", "lower worker.cpus"]),
        ({"memory": "640 GiB"}, ["0 of 1 slots have 640 GiB of memory", "lower worker.memory"]),
        ({"requirements": "TARGET.HasCVMFS"}, ["0 of 1 slots meet `TARGET.HasCVMFS`", "worker.requirements"]),
    ],
)
def test_a_pool_that_starts_nothing(
    arguments: dict[str, Any], words: list[str], new_cluster: NewCluster, messages: list[dict[str, Any]]
) -> None:
    cluster = new_cluster(n_workers=2, start_timeout="3 s", **arguments)
    text = wait_until(lambda: texts(messages, "failed"), 30, "the end of patience")
    assert "worker.start_timeout = 3 s" in text and "2 worker jobs wait" in text
    assert all(word in text for word in words), text
    cluster.close()


def test_whoever_asks_again_has_jobs_that_wait_already(
    new_cluster: NewCluster, queue: ScheddClient, messages: list[dict[str, Any]]
) -> None:
    cluster = new_cluster(n_workers=2, start_timeout="5 s", requirements="false")
    wait_until(lambda: len(jobs_of(queue, cluster.name)) == 2, 4, "two jobs")
    cluster.adapt(minimum=1, maximum=4)
    text = wait_until(lambda: texts(messages, "failed"), 30, "the end of patience, though nothing was submitted anew")
    assert "worker.start_timeout = 5 s" in text and "1 worker job waits" in text
    cluster.close()


def test_a_submission_that_htcondor_refuses(
    new_cluster: NewCluster, queue: ScheddClient, messages: list[dict[str, Any]]
) -> None:
    cluster = new_cluster(n_workers=1, extra_submit={"notification": "sometimes"})
    text = wait_until(lambda: texts(messages, "failed"), 20, "the end of patience")
    assert "worker.extra_submit['notification'] = 'sometimes'" in text and "Notification must be" in text
    assert "reached" not in text and "\n" not in text
    assert jobs_of(queue, cluster.name) == []
    cluster.close()


def test_a_full_pool(new_cluster: NewCluster, messages: list[dict[str, Any]]) -> None:
    with new_cluster(n_workers=4, on_message=None) as first, first.get_client() as client:
        client.wait_for_workers(4, timeout=60)
        second = new_cluster(n_workers=3, start_timeout="3 s")
        text = wait_until(lambda: texts(messages, "failed"), 30, "the end of patience")
        assert "3 worker jobs wait: the pool is full: 4 of 4 slots claimed" in text
        second.close()
