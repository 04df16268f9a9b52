"""HTCGatewayCluster on the real pool and gateway: used alone, as in a script or notebook."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, Worker

from prefect_htcdask.condor.schedd import ScheddClient
from prefect_htcdask.embedded import EmbeddedEndpoint
from prefect_htcdask.gateway import GatewayClusterError, HTCGateway, HTCGatewayCluster
from tests.support.cluster_fixtures import SMALL, gateway_clusters, jobs_named, jobs_of, supervisors, texts
from tests.support.waiting import wait_until

pytestmark = pytest.mark.pool

NewCluster = Callable[..., HTCGatewayCluster]


def test_scale_submits_and_removes_the_difference_only(
    new_cluster: NewCluster, queue: ScheddClient, messages: list[dict[str, Any]]
) -> None:
    with new_cluster(n_workers=1) as cluster, cluster.get_client() as client:
        client.wait_for_workers(1, timeout=60)
        first = jobs_of(queue, cluster.name)
        assert len(first) == 1
        cluster.scale(3)
        client.wait_for_workers(3, timeout=60)
        three = jobs_of(queue, cluster.name)
        assert len(three) == 3 and set(first) < set(three)
        # They have done without as they started.
        wait_until(lambda: all(client.run(gc.isenabled).values()), 20, "all collect garbage")
        # More than the pool has room for: the rest waits, and goes first.
        cluster.scale(8)
        wait_until(lambda: len(jobs_of(queue, cluster.name)) == 8, 20, "eight jobs")
        assert set(three) < set(jobs_of(queue, cluster.name))
        cluster.scale(3)
        wait_until(lambda: len(jobs_of(queue, cluster.name)) == 3, 20, "three jobs again")
        cluster.scale(1)
        wait_until(lambda: len(jobs_of(queue, cluster.name)) == 1, 30, "one job")
        assert client.submit(lambda: 6 * 7).result(timeout=30) == 42
        # Its process collects garbage as seldom as one of `dask worker`, and ticks seldom.
        (threshold,) = client.run(gc.get_threshold).values()
        assert tuple(threshold) == tuple(3 * count for count in gc.get_threshold())

        def colours() -> Any:
            from prefect.settings import PREFECT_LOGGING_COLORS

            return PREFECT_LOGGING_COLORS.value()

        assert list(client.run(colours).values()) == [False]

        def tick(dask_worker: Worker) -> float:
            return dask_worker.periodic_callbacks["tick"].callback_time

        assert list(client.run(tick).values()) == [100]
        name = cluster.name
        assert name in repr(cluster) and name in cluster._repr_html_()
    assert jobs_of(queue, name) == []
    assert cluster.summary["jobs"] >= 8 and cluster.summary["peak"] >= 3 and cluster.summary["left"] == 0
    assert texts(messages, "failed") == ""
    # What we removed ourselves is no news.
    assert texts(messages, "log") == ""


def test_workers_too_many_end_their_tasks_before_they_leave(
    new_cluster: NewCluster, queue: ScheddClient, messages: list[dict[str, Any]], tmp_path: Path
) -> None:
    def held(path: str) -> None:
        import time
        from pathlib import Path

        with Path(path).open("a") as stream:
            stream.write("begun\n")
        while not Path(path).with_name("go").exists():
            time.sleep(0.05)

    def leaving(dask_scheduler: Any) -> int:
        return sum(ws.status.name == "closing_gracefully" for ws in dask_scheduler.workers.values())

    def suspicions(dask_scheduler: Any) -> list[int]:
        return [task.suspicious for task in dask_scheduler.tasks.values()]

    paths = [tmp_path / f"task{number}" for number in range(3)]
    with new_cluster(n_workers=3) as cluster, cluster.get_client() as client:
        client.wait_for_workers(3, timeout=60)
        three = set(jobs_of(queue, cluster.name))
        futures = client.map(held, [str(path) for path in paths])
        wait_until(lambda: all(path.exists() for path in paths), 30, "three tasks run")
        cluster.scale(1)
        wait_until(lambda: client.run_on_scheduler(leaving) == 2, 20, "two workers are about to leave")
        # What they run asks for no others in their place; what comes later does, and does not find its way to them.
        cluster.adapt(minimum=1, maximum=3)
        later = client.submit(lambda: 42)
        assert later.result(timeout=60) == 42
        assert set(jobs_of(queue, cluster.name)) > three
        paths[0].with_name("go").touch()
        client.gather(futures)
        wait_until(lambda: len(jobs_of(queue, cluster.name)) == 1, 40, "one is left")
        assert [path.read_text() for path in paths] == ["begun\n"] * 3
        assert set(client.run_on_scheduler(suspicions)) == {0}
        left = three - set(jobs_of(queue, cluster.name))
        ended = queue.history(jobs_named(cluster.name), ["ProcId", "ClusterId", "ExitCode"], 9)
        codes = {f"{ad['ClusterId']}.{ad['ProcId']}": ad.get("ExitCode") for ad in ended}
        assert len(left) >= 2 and {job: codes.get(job) for job in left} == dict.fromkeys(left, 0)
    assert cluster.summary["jobs"] == 4
    assert texts(messages, "log") == ""


def test_adapt_goes_up_with_the_queue_and_back_to_the_minimum(
    new_cluster: NewCluster, queue: ScheddClient, monkeypatch: pytest.MonkeyPatch, messages: list[dict[str, Any]]
) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_HTCDASK_ADAPTIVE_RESIDENCE", "1 s")
    with new_cluster() as cluster, cluster.get_client() as client:
        assert jobs_of(queue, cluster.name) == []
        cluster.adapt(minimum=1, maximum=3)

        def slow(x: int) -> int:
            import time

            time.sleep(0.4)
            return x + 1

        futures = client.map(slow, range(12))
        assert client.gather(futures) == list(range(1, 13))
        del futures
        assert cluster.gateway is not None
        wait_until(lambda: len(jobs_of(queue, cluster.name)) == 1, 40, "back at the minimum")
        bursts = [m for m in messages if m["kind"] == "decision" and "+" in m["text"]]
        assert sum(m["submit"] for m in bursts) == 3, "three jobs in all, none twice"
        assert all(m["text"].endswith(f": +{m['submit']} workers") for m in bursts)
        cluster.adapt(active=False)
        assert len(jobs_of(queue, cluster.name)) == 1


def test_tasks_open_clients_of_their_own(new_cluster: NewCluster) -> None:
    def by_get_client() -> int:
        from distributed import get_client

        return int(get_client().submit(lambda: 1).result(timeout=20))

    def by_address(address: str) -> int:
        from distributed import Client

        with Client(address, set_as_default=False) as client:
            return int(client.submit(lambda: 2).result(timeout=20))

    def by_worker_client() -> int:
        from distributed import worker_client

        with worker_client() as client:
            return int(client.submit(lambda: 3).result(timeout=20))

    with new_cluster(n_workers=1, nthreads=3) as cluster, cluster.get_client() as client:
        futures = [
            client.submit(by_get_client),
            client.submit(by_address, client.scheduler.address),
            client.submit(by_worker_client),
        ]
        assert client.gather(futures) == [1, 2, 3]


async def test_asynchronously(condor_environment: EmbeddedEndpoint, queue: ScheddClient) -> None:
    async with HTCGatewayCluster(asynchronous=True, n_workers=1, **SMALL) as cluster:
        async with cluster.get_client() as client:
            assert await client.submit(lambda: 1) == 1
            await cluster.scale(2)
            await client.wait_for_workers(2, timeout=60)
        name = cluster.name
    assert jobs_of(queue, name) == []
    async with HTCGateway(asynchronous=True) as gateway:
        cluster = await gateway.new_cluster(**SMALL)
        assert cluster.name in [report.name for report in await gateway.list_clusters()]
        await cluster.shutdown()
        assert cluster.name not in [report.name for report in await gateway.list_clusters()]


def test_another_connection(
    condor_environment: EmbeddedEndpoint,
    new_cluster: NewCluster,
    queue: ScheddClient,
    messages: list[dict[str, Any]],
) -> None:
    cluster = new_cluster(n_workers=1)
    with HTCGateway() as gateway:
        assert repr(gateway) == f"HTCGateway<{condor_environment.gateway_address}>"
        assert cluster.name in [report.name for report in gateway.list_clusters()]
        other = gateway.connect(cluster.name)
        # The owner takes the wish: no second supervisor submits beside it.
        other.scale(2)
        wait_until(lambda: len(jobs_of(queue, cluster.name)) == 2, 20, "two jobs")
        assert other._supervisor is None
        other.close()
        assert len(jobs_of(queue, cluster.name)) == 2
        gateway.stop_cluster(cluster.name)
        wait_until(lambda: jobs_of(queue, cluster.name) == [], 15, "no job left")
        assert cluster.name not in gateway_clusters(condor_environment)
    # The owner finds its cluster gone, says so and ends; what is asked of it then fails at once.
    wait_until(lambda: "is gone" in texts(messages, "failed"), 20, "word of the end")
    with pytest.raises(GatewayClusterError):
        cluster.scale(5)
    cluster.close()
    assert jobs_of(queue, cluster.name) == []


def test_two_supervisors_never_both_submit(new_cluster: NewCluster, queue: ScheddClient) -> None:
    cluster = new_cluster(n_workers=1)
    other = HTCGatewayCluster.from_name(cluster.name, **SMALL)
    try:
        # Go past the question for an owner, as a second process in a race would.
        other._supervisor = other._start_supervisor()
        with pytest.raises(Exception, match="looked after by another supervisor"):
            other.gateway.sync(other._give_workers_to_supervisor)
        staged = cluster.run_directory / "staging" / "default"
        assert (staged / "worker_secrets.json").exists(), "the owner's files are left alone"
    finally:
        other.close()
    cluster.scale(2)
    wait_until(lambda: len(jobs_of(queue, cluster.name)) == 2, 20, "two jobs")


def test_a_cluster_may_outlive_its_process(
    condor_environment: EmbeddedEndpoint, queue: ScheddClient, tmp_path: Path
) -> None:
    code = f"""
        from prefect_htcdask import HTCGatewayCluster

        cluster = HTCGatewayCluster(shutdown_on_close=False, n_workers=1, **{SMALL!r})
        with cluster.get_client() as client:
            client.wait_for_workers(1, timeout=60)
        print(cluster.name)
        cluster.close()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=90, check=True
    )
    name = done.stdout.split()[-1]
    (job,) = jobs_of(queue, name)
    cluster = HTCGatewayCluster.from_name(name)
    with cluster.get_client() as client:
        assert client.submit(lambda: 5).result(timeout=30) == 5
        cluster.scale(2)
        client.wait_for_workers(2, timeout=60)
        assert job in jobs_of(queue, name), "the worker that was there is kept"
    cluster.shutdown()
    wait_until(lambda: jobs_of(queue, name) == [], 15, "no job left")
    assert name not in gateway_clusters(condor_environment)
    # It asks the gateway, which may be stopped after this test: of one that is away, nothing is concluded for long.
    wait_until(lambda: not supervisors(tmp_path / "runs"), 30, "its supervisor has ended")


def test_a_plain_client_s_cluster_can_be_given_workers(
    condor_environment: EmbeddedEndpoint, queue: ScheddClient
) -> None:
    from dask_gateway import Gateway
    from dask_gateway.auth import BasicAuth

    endpoint = condor_environment
    with Gateway(
        endpoint.gateway_address,
        proxy_address=endpoint.proxy_address,
        auth=BasicAuth(endpoint.username, endpoint.password),
    ) as gateway:
        plain = gateway.new_cluster()
        with HTCGatewayCluster.from_name(plain.name, shutdown_on_close=True, **SMALL) as cluster:
            cluster.scale(1)
            with Client(plain, security=plain.security) as client:
                assert client.submit(lambda: 3).result(timeout=60) == 3
            name = plain.name
        wait_until(lambda: jobs_of(queue, name) == [], 15, "no job left")
        plain.close()


def test_the_notebook_widget(new_cluster: NewCluster, queue: ScheddClient) -> None:
    with new_cluster() as cluster:
        widget = cluster._widget()
        assert widget is not None
        title, (_, accordion), *_ = widget.children[0], widget.children[1].children
        assert title is not None
        number, button = accordion.children[0].children
        number.value = 1
        button.click()
        wait_until(lambda: len(jobs_of(queue, cluster.name)) == 1, 20, "a job")
        status = cluster._widget().children[1].children[0]
        wait_until(lambda: "<td>1</td>" in status.value, 60, "a worker in the widget")
        minimum, maximum, adapt = accordion.children[1].children
        minimum.value, maximum.value = 2, 2
        adapt.click()
        wait_until(lambda: len(jobs_of(queue, cluster.name)) == 2, 20, "two jobs")


@pytest.mark.parametrize("n", [-1, 1.5, "2", True, None])
def test_a_number_of_workers_is_a_number(n: Any, shared: HTCGatewayCluster) -> None:
    with pytest.raises(ValueError, match="no number of workers"):
        shared.scale(n)


def test_a_range_goes_up(shared: HTCGatewayCluster) -> None:
    with pytest.raises(ValueError) as caught:
        shared.adapt(minimum=3, maximum=2)
    assert "minimum = 3" in str(caught.value) and "maximum = 2" in str(caught.value)


@pytest.fixture(scope="module")
def shared(embedded: EmbeddedEndpoint, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cluster without workers, for what never reaches the pool."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PREFECT_INTEGRATIONS_HTCDASK_EMBEDDED_DIRECTORY", str(embedded.directory))
    patch.setenv("PREFECT_INTEGRATIONS_HTCDASK_EMBEDDED_USE_CONFIGURED_POOL", "false")
    patch.setenv("PREFECT_INTEGRATIONS_HTCDASK_CONDOR_DIRECTORY", str(tmp_path_factory.mktemp("runs")))
    with HTCGatewayCluster() as cluster:
        yield cluster
    patch.undo()


def test_the_default_says_what_the_supervisor_says_in_the_log(
    condor_environment: EmbeddedEndpoint, caplog: pytest.LogCaptureFixture, queue: ScheddClient
) -> None:
    caplog.set_level(logging.INFO)
    with HTCGatewayCluster(n_workers=1, **SMALL) as cluster:
        (job,) = wait_until(lambda: jobs_of(queue, cluster.name), 20, "a job")
        queue.remove([job], "by the test's own hand")
        wait_until(lambda: "by the test's own hand" in caplog.text, 20, "the removal in the log")
        assert f"HTCondor job {job} removed" in caplog.text
        wait_until(lambda: set(jobs_of(queue, cluster.name)) - {job}, 20, "another job in its place")
