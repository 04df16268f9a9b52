"""What `HTCGateway` and `HTCGatewayCluster` have from dask_gateway: each public name is decided on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from dask_gateway import Gateway, GatewayCluster

from prefect_htcdask import HTCDaskTaskRunner
from prefect_htcdask.condor.schedd import ScheddClient
from prefect_htcdask.embedded import EmbeddedEndpoint
from prefect_htcdask.gateway import GatewayClusterError, HTCGateway, HTCGatewayCluster
from prefect_htcdask.gateway.finalizers import PrivateGateway
from prefect_htcdask.gateway.scale_requests import adapt_request
from prefect_htcdask.settings import SettingsError, load_settings
from tests.support.cluster_fixtures import SMALL, gateway_clusters, jobs_of
from tests.support.waiting import wait_until

OURS = "ours"
SAFE = "as inherited: "

GATEWAY = {
    "adapt_cluster": OURS,
    "asynchronous": SAFE + "tells how this object was made",
    "close": OURS,
    "cluster_options": SAFE + "the gateway's own options, which new_cluster takes beside the workers' settings",
    "connect": OURS,
    "get_cluster": SAFE + "a report on the scheduler",
    "get_versions": SAFE + "asks only",
    "list_clusters": SAFE + "reports on the schedulers",
    "loop": SAFE + "tells how this object was made",
    "new_cluster": OURS,
    "scale_cluster": OURS,
    "stop_cluster": OURS,
    "submit": OURS,
    "sync": SAFE + "runs a coroutine",
    "__aenter__": SAFE + "gives this object",
    "__aexit__": SAFE + "closes the connections",
    "__enter__": SAFE + "gives this object",
    "__exit__": SAFE + "calls close",
    "__del__": OURS,
    "__init__": OURS,
    "__repr__": OURS,
}

CLUSTER = {
    "adapt": OURS,
    "asynchronous": SAFE + "tells how this object was made",
    "close": OURS,
    "from_name": OURS,
    "get_client": OURS,
    "loop": SAFE + "tells how this object was made",
    "scale": OURS,
    "shutdown": SAFE + "calls close",
    "__aenter__": SAFE + "starts it by our _start_async",
    "__aexit__": SAFE + "stops it by our _stop_internal",
    "__await__": SAFE + "starts it by our _start_async",
    "__enter__": SAFE + "gives this object",
    "__exit__": SAFE + "calls close",
    "__del__": OURS,
    "__init__": OURS,
    "__repr__": OURS,
}

INNER = {
    **{name: OURS for name in ("adapt_cluster", "connect", "new_cluster", "scale_cluster", "stop_cluster", "__del__")},
    "submit": SAFE + "a scheduler without workers, which HTCGateway().connect gives some",
    **{name: SAFE + "asks only" for name in ("cluster_options", "get_cluster", "get_versions", "list_clusters")},
    **{name: SAFE + "calls nothing but the above" for name in ("asynchronous", "close", "loop", "sync")},
    **{name: SAFE for name in ("__aenter__", "__aexit__", "__enter__", "__exit__", "__init__", "__repr__")},
}
"""`HTCGatewayCluster.gateway`, dask_gateway's own client: what would touch workers says what to use."""


@pytest.mark.parametrize(
    ("base", "drop_in", "decided"),
    [
        (Gateway, HTCGateway, GATEWAY),
        (GatewayCluster, HTCGatewayCluster, CLUSTER),
        (Gateway, PrivateGateway, INNER),
    ],
)
def test_every_inherited_name_is_decided_on(base: type[Any], drop_in: type[Any], decided: dict[str, str]) -> None:
    nothing = {"__dict__", "__doc__", "__module__", "__weakref__", "__firstlineno__", "__static_attributes__"}
    inherited = {
        name for name in vars(base) if (name.startswith("__") or not name.startswith("_")) and name not in nothing
    }
    assert inherited - decided.keys() == set(), "new in dask_gateway: ours, safe, or an error that says what to use?"
    assert decided.keys() - inherited == set(), "gone from dask_gateway"
    assert {name for name, how in decided.items() if how == OURS} == inherited & vars(drop_in).keys()


@pytest.mark.parametrize("name", ["adapt_cluster", "connect", "new_cluster", "scale_cluster", "stop_cluster"])
def test_the_client_inside_a_cluster_says_what_to_use(name: str) -> None:
    gateway = PrivateGateway("http://127.0.0.1:9")
    with pytest.raises(GatewayClusterError, match=r"use (cluster|HTCGateway\(\))\."):
        getattr(gateway, name)("some-cluster", 2)
    gateway.close()


@pytest.mark.parametrize("maximum", [None, math.inf])
def test_no_maximum_is_the_settings(maximum: Any) -> None:
    settings = load_settings(adaptive={"maximum": 7})
    request = adapt_request(1, maximum, None, {"default": {}}, settings)
    assert (request["minimum"], request["maximum"]) == (1, 7)
    runner = HTCDaskTaskRunner(adapt_kwargs={"minimum": 2, "maximum": maximum}, adaptive={"maximum": 7})
    adaptive = runner.effective_settings().adaptive
    assert (adaptive.minimum, adaptive.maximum) == (2, 7)


@pytest.mark.parametrize("maximum", [-math.inf, math.nan, 1.5])
def test_what_is_no_maximum_is_refused(maximum: Any) -> None:
    with pytest.raises(ValueError, match="no number of workers"):
        adapt_request(0, maximum, None, {"default": {}}, load_settings())


@pytest.mark.pool
def test_a_cluster_is_scaled_by_its_name(
    condor_environment: EmbeddedEndpoint,
    new_cluster: Callable[..., HTCGatewayCluster],
    queue: ScheddClient,
) -> None:
    cluster = new_cluster(n_workers=0)
    with HTCGateway() as gateway:
        gateway.scale_cluster(cluster.name, 2)
        wait_until(lambda: len(jobs_of(queue, cluster.name)) == 2, 30, "two jobs")
        gateway.adapt_cluster(cluster.name, minimum=1, maximum=math.inf)
        wait_until(lambda: len(jobs_of(queue, cluster.name)) == 1, 90, "one job")
        with pytest.raises(ValueError, match="no number of workers"):
            gateway.scale_cluster(cluster.name, -1)
        with pytest.raises(ValueError, match="minimum = 3"):
            gateway.adapt_cluster(cluster.name, minimum=3, maximum=2)
        with pytest.raises(ValueError, match="some-cluster"):
            gateway.scale_cluster("some-cluster", 1)
    assert cluster.status == "running"


@pytest.mark.pool
def test_a_scheduler_that_was_only_submitted_gets_workers_by_its_name(
    condor_environment: EmbeddedEndpoint, queue: ScheddClient
) -> None:
    with HTCGateway(settings=load_settings(worker=SMALL)) as gateway:
        with pytest.raises(SettingsError, match=r"memory='1 GiB'.*new_cluster"):
            gateway.submit(memory="1 GiB")
        name = gateway.submit()
        try:
            gateway.scale_cluster(name, 1)
            wait_until(lambda: len(jobs_of(queue, name)) == 1, 30, "a job")
            gateway.scale_cluster(name, 2)
            wait_until(lambda: len(jobs_of(queue, name)) == 2, 30, "two jobs")
        finally:
            gateway.stop_cluster(name)
        wait_until(lambda: jobs_of(queue, name) == [], 30, "no job left")
        assert name not in gateway_clusters(condor_environment)
