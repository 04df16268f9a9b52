"""A pool and gateway of a test's own, and what its keeper has started."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from prefect_htcdask.embedded import EmbeddedEndpoint, status, stop
from prefect_htcdask.embedded import endpoint as module
from prefect_htcdask.settings import EmbeddedSettings
from tests.support.waiting import wait_until

SUBMIT = """
import json, os, sys
import htcondor2
submit = htcondor2.Submit(json.loads(sys.argv[1]))
print(htcondor2.Schedd().submit(submit, count=int(sys.argv[2])).cluster())
"""


COUNT_JOBS = """
import htcondor2
print(len(htcondor2.Schedd().query("true", ["ClusterId"])))
"""


START_CLUSTER = """
import sys
from dask_gateway import BasicAuth, Gateway
gateway = Gateway(sys.argv[1], proxy_address="gateway://" + sys.argv[2], auth=BasicAuth(sys.argv[3], sys.stdin.read()))
print(gateway.new_cluster(shutdown_on_close=False).name)
"""


KEEPER = """
import sys
{}
from prefect_htcdask.embedded import keeper
sys.exit(keeper.main())
"""


def keeper_with(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the next keepers run with something changed."""
    real = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        if command[1:3] == ["-m", "prefect_htcdask.embedded.keeper"]:
            command = [command[0], "-c", KEEPER.format(code), *command[3:]]
        return real(command, **options)

    monkeypatch.setattr(module.subprocess, "run", run)


def until(condition: Callable[[], Any], timeout: float = 30) -> Any:
    """What `condition` says as soon as it is true; fails after `timeout` seconds of an idle machine."""
    return wait_until(condition, timeout, "as the test says", pause=0.05)


def in_pool(endpoint: EmbeddedEndpoint, code: str, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run Python code that uses the pool, in a process of its own, as every use of the bindings."""
    environment = {**os.environ, "CONDOR_CONFIG": str(endpoint.condor_config), **more.pop("environment", {})}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=300, **more
    )


def start_cluster(endpoint: EmbeddedEndpoint) -> str:
    arguments = [endpoint.gateway_address, endpoint.proxy_address, endpoint.username]
    result = in_pool(endpoint, START_CLUSTER, *arguments, input=endpoint.password)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def keeper_tree(settings: EmbeddedSettings) -> list[psutil.Process]:
    keeper = psutil.Process(status(settings)["keeper"])
    return [keeper, *keeper.children(recursive=True)]


@pytest.fixture
def own(tmp_path: Path) -> Iterator[EmbeddedSettings]:
    """Settings of a pool and gateway for one test, stopped at its end."""
    settings = EmbeddedSettings(directory=str(tmp_path / "own"), idle_timeout=120, use_configured_pool=False)
    yield settings
    stop(settings)
