"""What a worker job shows to every user of its pool: neither the name of its gateway cluster nor a secret."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import htcondor2
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_htcdask.cleanup.jobs import explained_jobs, worker_jobs
from prefect_htcdask.condor.schedd import ScheddClient
from prefect_htcdask.condor.submit_description import FlowRunTag, cluster_digest
from prefect_htcdask.embedded import EmbeddedEndpoint
from prefect_htcdask.gateway import HTCGateway, HTCGatewayCluster
from prefect_htcdask.settings import load_settings
from tests.support.cluster_fixtures import jobs_of
from tests.support.submit_descriptions import describe
from tests.support.waiting import wait_until

SECRET = "s3cr3t-of-a-worker"
PART = 8
"""Characters of a name that count as a part of it: so many stand nowhere by chance."""


def parts_of(name: str) -> Iterator[str]:
    """All parts of a cluster's name."""
    return (name[start : start + PART] for start in range(len(name) - PART + 1))


def shown(text: str, name: str) -> list[str]:
    """The parts of a cluster's name that stand in a text."""
    return [part for part in parts_of(name) if part in text]


@given(st.uuids(version=4).map(lambda drawn: drawn.hex), st.booleans())
def test_no_command_holds_the_name(name: str, in_flow: bool) -> None:
    flow_run = FlowRunTag("0-1", "run", "flow") if in_flow else None
    commands = describe(cluster_name=name, flow_run=flow_run)
    assert commands["My.HTCDaskClusterName"] == f'"{cluster_digest(name)}"'
    assert not [command for command, value in commands.items() if shown(value, name)]


@given(st.text(), st.text())
def test_digests(one: str, other: str) -> None:
    one, other = (text.encode(errors="replace").decode() for text in (one, other))
    assert len(cluster_digest(one)) == 32 and set(cluster_digest(one)) <= set("0123456789abcdef")
    assert (cluster_digest(one) == cluster_digest(other)) == (one == other)


@pytest.mark.pool
@pytest.mark.parametrize("in_flow", [True, False], ids=["flow", "no flow"])
def test_a_real_job_s_ad(
    in_flow: bool,
    new_cluster: Callable[..., HTCGatewayCluster],
    queue: ScheddClient,
    condor_environment: EmbeddedEndpoint,
    tmp_path: Path,
) -> None:
    tag = FlowRunTag("0f1e", "run one", "flow", api="https://prefect.example.org/api") if in_flow else None
    cluster = new_cluster(n_workers=1, flow_run=tag, worker_secrets={"PREFECT_API_KEY": SECRET})
    name = cluster.name
    with cluster.get_client() as client:
        job = client.submit(lambda: os.environ["_CONDOR_JOB_AD"]).result(timeout=90)
        machine = client.submit(lambda: os.environ["_CONDOR_MACHINE_AD"]).result(timeout=10)
        pid = client.submit(os.getpid).result(timeout=10)
        seen: dict[str, str] = {"the job's ad on its host": Path(job).read_text()}
        seen["its slot's"] = Path(machine).read_text()
        (ad,) = queue.query('HTCDaskClusterName isnt "" && JobStatus == 2')
        seen["its ad in the queue"] = json.dumps(ad, default=str)
        for one in htcondor2.Collector().query():
            seen[f"the collector's of {one.get('MyType')} {one.get('Name')}"] = str(one)
        for process in (psutil.Process(pid), *psutil.Process(pid).parents()[:2]):
            seen[f"the command line of {process.pid}"] = " ".join(process.cmdline())
        # What else may read here who is not us: where the schedd writes, and the names of paths.
        assert ad["HTCDaskClusterName"] == cluster_digest(name) == cluster.run_directory.name
        assert str(cluster.run_directory) in {ad["Iwd"], str(Path(ad["UserLog"]).parent)}
    # Users find their jobs as before: the commands ask for all of theirs.
    (found,) = worker_jobs(cluster.parts)
    assert (found.cluster, found.batch_name) == (cluster_digest(name), "run one" if in_flow else cluster_digest(name))
    assert [one.job_id for one in explained_jobs(cluster.parts, load_settings())] == [found.job_id]
    assert not shown(json.dumps(asdict(found)), name)
    key = cluster.security.tls_key.splitlines()[3]
    with HTCGateway(parts=cluster.parts) as gateway:
        gateway.stop_cluster(name)
    wait_until(lambda: jobs_of(queue) == [], 30, "the job is gone")
    (left,) = queue.history(f"ClusterId == {ad['ClusterId']}", [], 1)
    seen["its ad in the history"] = json.dumps(left, default=str)
    assert len(seen["its ad in the queue"]) > 2000 and len(seen["its ad in the history"]) > 2000
    assert {where: parts for where, text in seen.items() if (parts := shown(text, name))} == {}
    hidden: Mapping[str, Any] = {"secret": SECRET, "key": key, "password": condor_environment.password}
    assert [(where, what) for where, text in seen.items() for what, value in hidden.items() if value in text] == []
