"""Which Prefect API knows a flow run: its name in job ads, and two servers whose sweeps leave each other alone."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, PREFECT_API_URL, temporary_settings
from prefect.states import Crashed

from prefect_htcdask import remove_leftover_jobs
from prefect_htcdask.cleanup.sweep import sweep
from prefect_htcdask.condor.schedd import ScheddClient
from prefect_htcdask.condor.submit_description import FlowRunTag, cluster_digest
from prefect_htcdask.embedded import EmbeddedEndpoint
from prefect_htcdask.gateway import HTCGatewayCluster
from prefect_htcdask.settings import load_settings
from prefect_htcdask.utils.api_identity import api_identity, current_api, ephemeral_identity
from tests.support.cluster_fixtures import gateway_clusters, jobs_of
from tests.support.command_line import run
from tests.support.plain_flow import PlainFlow
from tests.support.prefect_fixtures import PrefectServer, nothing
from tests.support.waiting import wait_until
from tools.prefect_server import prefect_server as running_server


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://prefect.example.org/api/", "https://prefect.example.org/api"),
        (
            "https://API.prefect.cloud/api/accounts/1/workspaces/2",
            "https://api.prefect.cloud/api/accounts/1/workspaces/2",
        ),
        ("https://anne:secret@prefect.example.org:444/api?token=secret#secret", "https://prefect.example.org:444/api"),
        ("http://127.0.0.1:4200/api", "http://127.0.0.1:4200/api on node1"),
        ("http://anne:secret@localhost:4200/api", "http://localhost:4200/api on node1"),
        ("http://anne:se/cret@prefect.example.org/api", ""),
    ],
)
def test_an_api_s_name(url: str, name: str) -> None:
    assert api_identity(url, "node1") == name
    assert api_identity(name, "node2") == name, "the name of a name"


@pytest.mark.parametrize(
    ("database", "name"),
    [
        (
            "sqlite+aiosqlite:////home/anne/.prefect/prefect.db",
            "sqlite+aiosqlite:////home/anne/.prefect/prefect.db on node1",
        ),
        (
            "postgresql+asyncpg://anne:se/cret@db.example.org/prefect?x=secret",
            "postgresql+asyncpg://db.example.org/prefect",
        ),
        ("postgresql+asyncpg://anne:secret@localhost/prefect", "postgresql+asyncpg://localhost/prefect on node1"),
        ("sqlite+aiosqlite:///file::memory:?cache=shared&uri=true", ""),
    ],
)
def test_the_name_of_an_ephemeral_server_is_its_database_s(database: str, name: str) -> None:
    assert ephemeral_identity(database, "node1") == name


SECRET = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1).map(lambda text: f"Zq7{text}Zq7")


@given(
    SECRET,
    st.sampled_from(["https://x:{}@h.example/api", "http://{}@127.0.0.1:4200/api", "https://h.example/api?k={}"]),
)
def test_no_login_is_in_a_name(secret: str, url: str) -> None:
    """As it is read: what follows a slash of a wrong URL is a path, and was never a login."""
    name = api_identity(url.format(secret), "node1")
    assert "Zq7" not in name or "/" in secret or "#" in secret or "?" in secret


def test_the_settings_name_the_api(tmp_path: Path) -> None:
    with temporary_settings({PREFECT_API_URL: "https://anne:secret@prefect.example.org/api"}):
        assert current_api() == "https://prefect.example.org/api"
    database = f"sqlite+aiosqlite:///{tmp_path}/prefect.db"
    # Wherever the server listens this time.
    with temporary_settings({PREFECT_API_URL: None, PREFECT_API_DATABASE_CONNECTION_URL: database}):
        assert current_api().startswith(f"{database} on ")


# Two real servers


@pytest.fixture(scope="module")
def other_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A second server, beside the one that this process uses."""
    with running_server(tmp_path_factory.mktemp("other")) as server:
        yield server


@pytest.mark.pool
@pytest.mark.timeout(400)
def test_a_flow_run_of_another_server_is_spared(
    condor_environment: EmbeddedEndpoint,
    queue: ScheddClient,
    api: SyncPrefectClient,
    other_server: PrefectServer,
    new_cluster: Callable[..., HTCGatewayCluster],
    tmp_path: Path,
) -> None:
    unknown = FlowRunTag(str(uuid.uuid4()), "deleted", "nothing", api=current_api())
    deleted = new_cluster(flow_run=unknown, requirements="false")
    deleted.scale(2)
    theirs = PlainFlow(tmp_path, "theirs", environment=other_server.environment)
    try:
        theirs.wait_until_it_computes()
        (job,) = jobs_of(queue, theirs.cluster)
        for state in ("computes", "was killed"):
            if state == "was killed":
                theirs.kill_all()
                # Only jobs in the queue tell of it now, as on another submit host.
                (deleted.run_directory.parent / cluster_digest(theirs.cluster) / "cluster.json").unlink()
            swept = sweep(load_settings())
            assert swept.all_is_well, swept.problems
            assert swept.jobs_removed == (2 if state == "computes" else 0)
            (spared,) = swept.other_apis
            assert (spared.flow_run_ids, spared.jobs) == ([theirs.flow_run_id], 1), state
            line = f"belong to 1 flow runs of the Prefect API at {other_server.url} on "
            assert line in "\n".join(swept.lines()) and "sweep with that API's settings" in "\n".join(swept.lines())
            assert jobs_of(queue, theirs.cluster) == [job] and theirs.cluster in gateway_clusters(condor_environment)
        # Nor does a hook that was given a flow run of another API's than this process's.
        with get_client(sync_client=True) as client:
            foreign = client.read_flow_run(client.create_flow_run(nothing).id)
        foreign = foreign.model_copy(update={"id": uuid.UUID(theirs.flow_run_id), "run_count": 1})
        remove_leftover_jobs(nothing, foreign, Crashed())
        assert jobs_of(queue, theirs.cluster) == [job]
        right = run("sweep", "--json", **other_server.environment)
        report = json.loads(right.stdout)
        assert right.returncode == 0, right.stderr
        assert [one["api"] for one in report["other_apis"]] == []
        # Running, as far as its own API knows: its lease is what ends it, or somebody who says that it has crashed.
        with temporary_settings({PREFECT_API_URL: other_server.url}), get_client(sync_client=True) as client:
            client.set_flow_run_state(uuid.UUID(theirs.flow_run_id), Crashed(), force=True)
        right = run("sweep", "--json", **other_server.environment)
        assert right.returncode == 0 and json.loads(right.stdout)["jobs_removed"] == 1, right.stdout + right.stderr
        wait_until(lambda: jobs_of(queue, theirs.cluster) == [], 20, "its own sweep removes it")
    finally:
        theirs.end()
