"""A pool with other users: what they write into their ads is nothing to us, whoever we are to the schedd."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.pool_users import PoolUser, SharedPool, shared_pool

pytestmark = pytest.mark.pool

OURS = 'HTCDaskClusterName == "ours"'

CLIENT = """
import json, sys
from prefect_htcdask.condor.address import ScheddAddress
from prefect_htcdask.condor import schedd
client = schedd.ScheddClient(schedd.ScheddAddress(config_file=sys.argv[1]))
try:
    answer = eval(sys.argv[2])
except schedd.ScheddError as exc:
    answer = f"{type(exc).__name__}: {exc}"
print(json.dumps(answer, default=str))
"""

ATTRIBUTES = ("Owner", "JobStatus", "HTCDaskLeaseExpires")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedPool]:
    with shared_pool(tmp_path_factory.mktemp("shared")) as made:
        yield made


@pytest.fixture
def jobs(pool: SharedPool, tmp_path: Path) -> Iterator[dict[str, str]]:
    """One job of each user, both of the same cluster as far as their ads say; ids by the users' names."""
    made = {user.name: user.submit(tmp_path, HTCDaskClusterName='"ours"') for user in (pool.anne, pool.mallory)}
    yield made
    if queue(pool):
        operator(pool).condor("condor_rm", "-all")


def operator(pool: SharedPool) -> PoolUser:
    """As whom the daemons run: a super user of the queue, who may edit and remove everybody's jobs."""
    assert pool.endpoint.condor_config is not None
    return PoolUser("operator", pool.endpoint.condor_config)


def client(user: PoolUser, expression: str, setup: str = "") -> Any:
    """What an expression of a `ScheddClient` of the user's gives, in a process of its own."""
    code = CLIENT.replace("try:", f"{setup}\ntry:", 1)
    return json.loads(user.condor(sys.executable, "-c", code, str(user.config_file), expression))


def queue(pool: SharedPool) -> dict[str, dict[str, Any]]:
    """All jobs in the queue, by their owners."""
    text = operator(pool).condor("condor_q", "-allusers", "-json", "-attributes", ",".join(ATTRIBUTES))
    return {ad["Owner"]: ad for ad in json.loads(text or "[]")}


def test_no_job_of_another_user_is_looked_at(pool: SharedPool, jobs: dict[str, str]) -> None:
    assert client(pool.anne, f"[ad['Owner'] for ad in client.query({OURS!r}, ['Owner'])]") == ["anne"]
    assert client(pool.anne, f"[ad['Owner'] for ad in client.query({OURS!r} + ' || true')]") == ["anne"]
    waiting = f"client.waiting_job({OURS!r})"
    operator(pool).condor("condor_release", jobs["mallory"])
    assert client(pool.anne, f"{waiting} is None")
    operator(pool).condor("condor_rm", "-all")
    left = (
        f"[ad['Owner'] for ad in client.history({OURS!r} + ' && ClusterId >= {int(float(jobs['anne']))}', ['Owner'])]"
    )
    assert client(pool.anne, left) == ["anne"]


@pytest.mark.parametrize("rights", ["ordinary", "super"])
def test_no_job_of_another_user_is_changed(pool: SharedPool, jobs: dict[str, str], rights: str, tmp_path: Path) -> None:
    """Neither where the schedd would refuse all for it, nor where it would let us."""
    user = pool.anne if rights == "ordinary" else operator(pool)
    if rights == "super":
        user.submit(tmp_path, HTCDaskClusterName='"ours"')
        (name,) = queue(pool).keys() - {"anne", "mallory"}
    else:
        name = "anne"
    assert client(user, f"client.renew({OURS!r}, 500)") == 1
    after = queue(pool)
    assert [owner for owner, ad in after.items() if "HTCDaskLeaseExpires" in ad] == [name]
    assert client(user, f"client.remove({OURS!r}, 'test')") == 1
    assert client(user, f"client.forget({OURS!r}, 'test')") in (0, 1)
    assert queue(pool).keys() == after.keys() - {name}
    assert queue(pool)["mallory"] == after["mallory"]


def test_a_renewal_that_is_refused_as_a_whole_goes_job_by_job(pool: SharedPool, jobs: dict[str, str]) -> None:
    """The owner is left out here, as a schedd might that knows users by more than a name: it refuses the whole edit."""
    careless = "schedd.ScheddClient._mine = lambda self, condition: condition"
    said = client(pool.anne, f"client.renew({OURS!r}, 500)", careless)
    assert "refused" in said and "Unable to edit" in said and jobs["mallory"] in said
    assert "cannot be reached" not in said and jobs["anne"] not in said
    assert [owner for owner, ad in queue(pool).items() if "HTCDaskLeaseExpires" in ad] == ["anne"]


def test_a_schedd_to_which_we_are_nobody_has_no_job_of_ours(pool: SharedPool) -> None:
    """A stand-in for the schedd's answer: the pool lets nobody in without a name."""
    unmapped = "schedd.ScheddClient.user = lambda self: 'unauthenticated@unmapped'"
    said = client(pool.anne, f"client.remove({OURS!r}, 'test')", unmapped)
    assert said.startswith("ScheddError") and "condor.token_file" in said and "CERTIFICATE_MAPFILE" in said
