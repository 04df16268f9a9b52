"""Worker groups of an HTCGatewayCluster, on the real pool and gateway."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from dask_gateway import Gateway
from dask_gateway.auth import BasicAuth

from prefect_htcdask.condor.schedd import ScheddClient
from prefect_htcdask.embedded import EmbeddedEndpoint
from prefect_htcdask.gateway import GatewayClusterError, HTCGateway, HTCGatewayCluster
from prefect_htcdask.scheduler.worker_groups import OFFERS_METADATA
from prefect_htcdask.settings import SettingsError
from tests.support.cluster_fixtures import SMALL, jobs_named, jobs_of, texts
from tests.support.waiting import wait_until

pytestmark = pytest.mark.pool

NewCluster = Callable[..., HTCGatewayCluster]

# The pool has no GPU: what Dask knows of one is enough here.
WORKERS = {"cpu": {"maximum": 2}, "gpu": {"maximum": 1, "resources": {"GPU": 1}}}
OFFERS = {"cpu": {"htcdask-group-cpu": 1}, "gpu": {"htcdask-group-gpu": 1, "GPU": 1}}


def group_of_jobs(queue: ScheddClient, cluster_name: str) -> dict[str, str]:
    """The worker group of each job in the queue, by the job's ad."""
    ads = queue.query(jobs_named(cluster_name), ["ClusterId", "ProcId", "HTCDaskWorkerGroup"])
    return {f"{ad['ClusterId']}.{ad['ProcId']}": str(ad["HTCDaskWorkerGroup"]) for ad in ads}


def numbers(queue: ScheddClient, cluster_name: str) -> Mapping[str, int]:
    return Counter(group_of_jobs(queue, cluster_name).values())


def task() -> Callable[[int], str]:
    """A task that tells the HTCondor job that it runs in; made here, since the workers do not have this module."""

    def where(number: int) -> str:
        import time

        from distributed import get_worker

        time.sleep(0.3)
        return str(get_worker().name).split("-")[1]

    return where


def test_each_group_grows_with_its_own_tasks(
    new_cluster: NewCluster, queue: ScheddClient, messages: list[dict[str, Any]]
) -> None:
    with new_cluster(workers=WORKERS) as cluster, cluster.get_client() as client:
        assert cluster.worker_offers == OFFERS
        for group in cluster.worker_offers:
            cluster.adapt(group=group)
        jobs = set(client.gather(client.map(task(), range(4), resources={"GPU": 1}, pure=False)))
        groups = group_of_jobs(queue, cluster.name)
        assert {groups[job] for job in jobs} == {"gpu"}
        assert Counter(groups.values()) == {"gpu": 1}, "as many as its maximum, and none of the other group"
        futures = client.map(task(), range(12), resources={"htcdask-group-cpu": 1}, pure=False)
        jobs = set(client.gather(futures))
        groups = group_of_jobs(queue, cluster.name)
        assert {groups[job] for job in jobs} == {"cpu"}
        assert Counter(groups.values())["cpu"] == 2, "as many as its maximum"
    decisions = [message for message in messages if message["kind"] == "decision" and message["submit"]]
    submitted = {group: sum(m["submit"] for m in decisions if m["group"] == group) for group in WORKERS}
    assert submitted == {"cpu": 2, "gpu": 1}
    assert all(message["text"].endswith(f"+{message['submit']} {message['group']}") for message in decisions)
    summary = cluster.summary["groups"]
    assert (summary["cpu"]["jobs"], summary["gpu"]["jobs"], summary["gpu"]["peak"]) == (2, 1, 1)
    assert texts(messages, "failed") == ""


def test_a_task_for_which_no_group_has_anything_is_told_once(
    new_cluster: NewCluster, messages: list[dict[str, Any]]
) -> None:
    with new_cluster(workers=WORKERS) as cluster, cluster.get_client() as client:
        for group in cluster.worker_offers:
            cluster.adapt(group=group)
        future = client.submit(task(), 1, resources={"TPU": 2})
        wait_until(lambda: "TPU=2" in texts(messages, "log"), 20, "the warning")
        other = client.submit(task(), 2, resources={"GPU": 1}, pure=False)
        other.result(timeout=60)
        assert texts(messages, "log").count("TPU=2") == 1
        assert "no worker group offers" in texts(messages, "log") and "GPU=1" in texts(messages, "log")
        assert future.status == "pending"
        future.cancel()


def test_each_group_is_scaled_by_itself(new_cluster: NewCluster, queue: ScheddClient) -> None:
    cluster = new_cluster(workers=WORKERS, n_workers=1)
    wait_until(lambda: numbers(queue, cluster.name) == {"cpu": 1}, 20, "the first group's worker")
    cluster.scale(2, group="gpu")
    wait_until(lambda: numbers(queue, cluster.name) == {"cpu": 1, "gpu": 2}, 20, "two of the other group")
    before = group_of_jobs(queue, cluster.name)
    for ask in (lambda: cluster.scale(1, group="tpu"), lambda: cluster.adapt(group="tpu")):
        with pytest.raises(ValueError, match=r"group='tpu' .* cpu, gpu"):
            ask()
    with HTCGateway() as gateway:
        other = gateway.connect(cluster.name)
        assert other.worker_offers == OFFERS
        # Both wishes at once: neither takes the other's place.
        other.scale(1, group="gpu")
        other.scale(2)
        wait_until(lambda: numbers(queue, cluster.name) == {"cpu": 2, "gpu": 1}, 30, "both wishes")
        with pytest.raises(ValueError, match=r"group='tpu' .* cpu, gpu"):
            other.scale(1, group="tpu")
        other.close()
    after = group_of_jobs(queue, cluster.name)
    assert len(set(before) & set(after)) == 2, "of each group the one that was there stays"
    # A successor knows the groups of the jobs that it finds, and both wishes.
    handle = cluster._supervisor
    assert handle is not None
    lost = handle.pid
    os.kill(lost, signal.SIGKILL)
    wait_until(lambda: handle.pid != lost, 20, "a successor")
    cluster.scale(3, group="gpu")
    wait_until(lambda: numbers(queue, cluster.name) == {"cpu": 2, "gpu": 3}, 30, "two more")
    assert set(after) < set(group_of_jobs(queue, cluster.name))
    cluster.scale(0, group="cpu")
    wait_until(lambda: numbers(queue, cluster.name) == {"gpu": 3}, 30, "the other group alone")


def test_groups_that_nobody_looks_after_need_the_same_workers(
    condor_environment: EmbeddedEndpoint, queue: ScheddClient
) -> None:
    endpoint = condor_environment
    auth = BasicAuth(endpoint.username, endpoint.password)
    with Gateway(endpoint.gateway_address, proxy_address=endpoint.proxy_address, auth=auth) as gateway:
        plain = gateway.new_cluster()
        with plain.get_client() as client:
            # As the owner that was lost had left it.
            client.set_metadata(list(OFFERS_METADATA), OFFERS)
        with (
            HTCGatewayCluster.from_name(plain.name, **SMALL) as other,
            pytest.raises(GatewayClusterError, match=r"worker groups cpu, gpu, .* same workers="),
        ):
            other.scale(1, group="gpu")
        with HTCGatewayCluster.from_name(plain.name, shutdown_on_close=True, workers=WORKERS, **SMALL) as same:
            same.scale(1, group="gpu")
            wait_until(lambda: numbers(queue, plain.name) == {"gpu": 1}, 20, "its worker")
        wait_until(lambda: jobs_of(queue, plain.name) == [], 15, "no job left")
        plain.close()


def test_bad_starts_in_one_group(
    new_cluster: NewCluster, queue: ScheddClient, tmp_path: Path, messages: list[dict[str, Any]]
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('libcuda.so.1: cannot open shared object file')\n")
    python.chmod(0o755)
    tmp_path.chmod(0o755)
    workers = {"cpu": {}, "gpu": {"python": str(python)}}
    with new_cluster(workers=workers, n_workers=1) as cluster, cluster.get_client() as client:
        cluster.scale(1, group="gpu")
        text = wait_until(lambda: texts(messages, "failed"), 60, "the end of patience")
        assert text.startswith("worker group gpu: 3 workers in a row") and "libcuda.so.1" in text
        job = client.submit(task(), 1, resources={"htcdask-group-cpu": 1}).result(timeout=60)
        assert group_of_jobs(queue, cluster.name) == {job: "cpu"}, "the other group works"
        # Whoever repaired it and asks again gets a fresh budget.
        python.write_text(
            f"#!{sys.executable}\nimport os, sys\nos.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])\n"
        )
        cluster.scale(1, group="gpu")
        job = client.submit(task(), 2, resources={"htcdask-group-gpu": 1}).result(timeout=60)
        assert group_of_jobs(queue, cluster.name)[job] == "gpu"
        assert texts(messages, "failed") == text
        # One works, and no other comes up: that does not end the run, and is told.
        python.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('libcuda.so.2: cannot open shared object file')\n")
        cluster.scale(2, group="gpu")
        told = wait_until(
            lambda: texts(messages, "log") if "goes on with 1" in texts(messages, "log") else "", 60, "it"
        )
        assert "worker group gpu: 3 workers in a row" in told and "libcuda.so.2" in told
        assert texts(messages, "failed") == text


def test_tasks_go_to_workers_that_join_later(new_cluster: NewCluster) -> None:
    with new_cluster(workers=WORKERS, n_workers=1) as cluster, cluster.get_client() as client:
        client.wait_for_workers(1, timeout=60)
        futures = client.map(task(), range(60), resources={"htcdask-group-cpu": 1}, pure=False)
        cluster.scale(2)
        client.wait_for_workers(2, timeout=60)
        joined = time.monotonic()
        left = sum(future.status != "finished" for future in futures)
        shares = Counter(client.gather(futures))
        assert len(shares) == 2
        print(f"{left} tasks of 0.3 s left when the second worker joined: {time.monotonic() - joined:.1f} s")
        assert min(shares.values()) >= left // 2 - 6, shares


@pytest.mark.parametrize(
    ("workers", "words"),
    [({}, ["workers", "leave it out"]), ({"gpu": {"gpu": 1}}, ["workers.gpu.gpu is no setting"])],
)
def test_groups_that_cannot_be(workers: Any, words: list[str], new_cluster: NewCluster) -> None:
    with pytest.raises(SettingsError) as caught:
        new_cluster(workers=workers)
    assert all(word in str(caught.value) for word in words)
