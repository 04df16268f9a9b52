"""Clusters on the real pool and gateway, and a look at the queue that is independent of the code under test."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from dask_gateway import Gateway
from dask_gateway.auth import BasicAuth

from prefect_htcdask.condor.address import ScheddAddress
from prefect_htcdask.condor.schedd import ScheddClient
from prefect_htcdask.condor.submit_description import cluster_constraint, cluster_digest
from prefect_htcdask.embedded import EmbeddedEndpoint
from prefect_htcdask.gateway import HTCGatewayCluster
from tests.support.waiting import wait_until

SMALL = {"memory": "300 MiB", "disk": "100 MiB"}
"""Worker settings that fit several times on a small machine."""


@pytest.fixture(scope="session")
def queue(embedded: EmbeddedEndpoint) -> Iterator[ScheddClient]:
    """The session's schedd, in this process."""
    before = os.environ.get("CONDOR_CONFIG")
    client = ScheddClient(ScheddAddress(config_file=str(embedded.condor_config)))
    # The client names its configuration to the whole process; the code under test shall find its own.
    if before is None:
        os.environ.pop("CONDOR_CONFIG", None)
    else:
        os.environ["CONDOR_CONFIG"] = before
    yield client
    client.close()


@pytest.fixture
def condor_environment(
    htcdask_environment: EmbeddedEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queue: ScheddClient
) -> Iterator[EmbeddedEndpoint]:
    """The session's pool and gateway as the default, an own run directory, and nothing left behind at the end."""
    monkeypatch.setenv("PREFECT_INTEGRATIONS_HTCDASK_CONDOR_DIRECTORY", str(tmp_path / "runs"))
    yield htcdask_environment
    # A test that failed must not spoil the next one.
    if jobs_of(queue):
        with suppress(Exception):
            queue.remove("HTCDaskClusterName isnt undefined", "end of test")
    wait_until(lambda: not jobs_of(queue), 30, "no job left by the test")


@pytest.fixture
def messages() -> list[dict[str, Any]]:
    """What a supervisor said; give its `append` as `on_message`."""
    return []


@pytest.fixture
def new_cluster(
    condor_environment: EmbeddedEndpoint, messages: list[dict[str, Any]]
) -> Iterator[Callable[..., HTCGatewayCluster]]:
    """Makes clusters of small workers, which are shut down at the end of the test."""
    clusters: list[HTCGatewayCluster] = []

    def make(**arguments: Any) -> HTCGatewayCluster:
        cluster = HTCGatewayCluster(**{**SMALL, "on_message": messages.append, **arguments})
        clusters.append(cluster)
        return cluster

    yield make
    for cluster in clusters:
        if cluster.status != "closed":
            cluster.shutdown()


def jobs_named(cluster_name: str) -> str:
    """The condition for the worker jobs of a gateway cluster, by its name."""
    return cluster_constraint(cluster_digest(cluster_name))


def jobs_of(queue: ScheddClient, cluster_name: str | None = None) -> list[str]:
    """Ids of a cluster's worker jobs in the queue, in any state; of all clusters by default."""
    condition = jobs_named(cluster_name) if cluster_name else "HTCDaskClusterName isnt undefined"
    return sorted(f"{ad['ClusterId']}.{ad['ProcId']}" for ad in queue.query(condition, ["ClusterId", "ProcId"]))


def gateway_clusters(endpoint: EmbeddedEndpoint) -> list[str]:
    """Names of clusters that the gateway has running or starting, asked with dask_gateway's own client."""
    with Gateway(
        endpoint.gateway_address,
        proxy_address=endpoint.proxy_address,
        auth=BasicAuth(endpoint.username, endpoint.password),
    ) as gateway:
        return [report.name for report in gateway.list_clusters()]


def supervisors(runs: Path) -> list[int]:
    """Process ids of the living supervisors whose run directories are in `runs`."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            ours = process.environ().get("PREFECT_INTEGRATIONS_HTCDASK_CONDOR_DIRECTORY") == str(runs)
            if ours and "prefect_htcdask.supervisor" in process.cmdline():
                found.append(process.pid)
    return found


def texts(messages: list[dict[str, Any]], *kinds: str) -> str:
    """What messages of some kinds say, one line each."""
    return "\n".join(str(message["text"]) for message in messages if message["kind"] in kinds)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() - self._start
