"""A stock gateway: server, proxy and schedulers with none of our code in their environment."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from prefect_htcdask.condor.schedd import ScheddClient
from prefect_htcdask.embedded import EmbeddedEndpoint
from prefect_htcdask.embedded.ports import free_port
from prefect_htcdask.gateway import HTCGateway, HTCGatewayCluster
from tests.support.cluster_fixtures import SMALL, jobs_of
from tests.support.waiting import wait_until

pytestmark = pytest.mark.pool

CONFIG = """
c.DaskGateway.backend_class = "dask_gateway_server.backends.local.UnsafeLocalBackend"
c.DaskGateway.authenticator_class = "dask_gateway_server.auth.SimpleAuthenticator"
c.SimpleAuthenticator.password = "stock"
c.DaskGateway.address = "127.0.0.1:{server}"
c.Proxy.address = "127.0.0.1:{proxy}"
c.UnsafeLocalBackend.clusters_directory = "{directory}"
c.UnsafeLocalBackend.inherited_environment = ["PATH", "PYTHONPATH"]
c.ClusterConfig.scheduler_cmd = ["{python}", "-S", "-m", "distributed.cli.dask_scheduler"]
"""


@dataclass(frozen=True)
class Stock:
    """A stock gateway and the environment that it and its schedulers run in."""

    address: str
    environment: dict[str, str]


def answers(url: str) -> bool:
    """Whether a GET of `url` succeeds."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.fixture
def stock(tmp_path: Path, embedded: EmbeddedEndpoint) -> Iterator[Stock]:
    # All that is installed but this package: as in an environment of the site's own.
    site = tmp_path / "site"
    site.mkdir()
    for installed in {Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib"))}:
        for entry in installed.iterdir():
            name = entry.name.lower()
            if "htcdask" not in name and not name.startswith("prefect") and not name.endswith(".pth"):
                (site / entry.name).symlink_to(entry)
    # -S: no site module, so that no .pth file leads to this checkout.
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(site), "HOME": str(tmp_path)}
    ports = {"server": free_port(), "proxy": free_port()}
    clusters = tmp_path / "clusters"
    clusters.mkdir()
    config = tmp_path / "gateway_config.py"
    config.write_text(CONFIG.format(directory=clusters, python=sys.executable, **ports))
    with (tmp_path / "gateway.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-S", "-m", "dask_gateway_server", "-f", str(config)],
            env=environment,
            cwd=tmp_path,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        # Through the proxy: it answers before it has learnt the way to the server.
        url = f"http://127.0.0.1:{ports['proxy']}"
        wait_until(lambda: answers(f"{url}/api/version"), 30, "the gateway answers through its proxy")
        yield Stock(url, environment)
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(10)


def test_workers_join_a_gateway_that_knows_nothing_of_us(
    stock: Stock, condor_environment: EmbeddedEndpoint, queue: ScheddClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = subprocess.run(
        [sys.executable, "-S", "-c", "import dask_gateway_server, distributed\nimport prefect_htcdask"],
        env=stock.environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert "No module named 'prefect_htcdask'" in absent.stderr
    prefix = "PREFECT_INTEGRATIONS_HTCDASK_"
    monkeypatch.setenv(f"{prefix}GATEWAY_ADDRESS", stock.address)
    monkeypatch.setenv(f"{prefix}GATEWAY_PASSWORD", "stock")
    monkeypatch.setenv(f"{prefix}CONDOR_CONFIG_FILE", str(condor_environment.condor_config))

    def has_our_code(dask_scheduler: Any) -> bool:
        from importlib.util import find_spec

        return find_spec("prefect_htcdask") is not None

    with HTCGatewayCluster(n_workers=1, **SMALL) as cluster, cluster.get_client() as client:
        assert client.submit(lambda: 2).result(timeout=60) == 2
        assert client.run_on_scheduler(has_our_code) is False
        # A stock scheduler would retire workers that its gateway did not start, three seconds after they come.
        cluster.adapt(minimum=2, maximum=2)
        client.wait_for_workers(2, timeout=60)
        workers = set(client.scheduler_info()["workers"])
        wait_until(lambda: len(client.run(lambda: 1)) == 2, 10, "two workers")

        def nap() -> int:
            import time

            time.sleep(4)
            return 1

        assert client.submit(nap).result(timeout=30) == 1
        assert set(client.scheduler_info()["workers"]) == workers
        name = cluster.name
        with HTCGateway() as gateway:
            assert [report.name for report in gateway.list_clusters()] == [name]
    assert jobs_of(queue, name) == []
    with HTCGateway() as gateway:
        assert gateway.list_clusters() == []
