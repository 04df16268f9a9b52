"""What is asked of a schedd names our own jobs only, whatever is called. The bindings' calls are stand-ins here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import classad2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_htcdask.condor.address import ScheddAddress
from prefect_htcdask.condor.schedd import EditRefused, ScheddClient, ScheddError

CONDITION = "X || true"


class Recorder(ScheddClient):
    """A client whose schedd knows it by a name, and takes whatever it is asked."""

    def __init__(self, user: str = "anne@example.org") -> None:
        super().__init__(ScheddAddress())
        self.name, self.asked_who, self.calls = user, 0, list[tuple[Any, ...]]()

    def user(self) -> str:
        self.asked_who += 1
        return self.name

    def _call(self, what: str, function: str, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((function, *args))
        if function == "query":
            return [{"ClusterId": 1, "ProcId": 0, "JobStatus": 1}] if args[1] else []
        return {"act": {"TotalSuccess": 1}, "edit": 1, "history": []}[function]

    @property
    def constraints(self) -> list[str]:
        """Those of the calls so far; an action and an edit stand before them, or behind."""
        return [next(arg for arg in args if isinstance(arg, str) and "X" in arg) for _, *args in self.calls]


def plain(ad: Any, *_: Any) -> dict[str, Any]:
    return dict(ad)


@pytest.fixture(autouse=True)
def plain_ads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefect_htcdask.condor.schedd._plain_ad", plain)


def matches(constraint: str, owner: str) -> bool:
    ad = classad2.ClassAd({"Owner": owner, "JobStatus": 1, "X": True})
    ad["Wanted"] = classad2.ExprTree(constraint)
    return ad.eval("Wanted") is True


CALLS: dict[str, Callable[[ScheddClient], Any]] = {
    "query": lambda client: client.query(CONDITION),
    "history": lambda client: client.history(CONDITION, ["X"]),
    "waiting_job": lambda client: client.waiting_job(CONDITION),
    "remove": lambda client: client.remove(CONDITION, "test"),
    "forget": lambda client: client.forget(CONDITION, "test"),
    "renew": lambda client: client.renew(CONDITION, 60),
}


@pytest.mark.parametrize("name", CALLS)
def test_each_call_names_the_owner(name: str) -> None:
    client = Recorder()
    CALLS[name](client)
    CALLS[name](client)
    assert client.asked_who == 1, "once per connection"
    for constraint in client.constraints:
        assert matches(constraint, "anne")
        assert not [other for other in ("mallory", "Anne", "", "anne2") if matches(constraint, other)]


@given(st.text(min_size=1).filter(lambda name: "@" not in name and name.isprintable()))
def test_any_owner_s_name_is_a_string(name: str) -> None:
    if name not in ("unauthenticated", "unmapped"):
        constraint = Recorder(f"{name}@example.org")._mine("true")
        assert matches(constraint, name) and not matches(constraint, name + "x")


@pytest.mark.parametrize("user", ["", "@example.org", "unauthenticated@unmapped", "ssl@unmapped"])
def test_who_is_nobody_has_no_jobs(user: str) -> None:
    client = Recorder(user)
    with pytest.raises(ScheddError, match=r"condor.token_file"):
        client.remove(CONDITION, "test")
    assert client.calls == []


class Refusing(Recorder):
    """A client of a schedd that refuses an edit for one job in it, or by constraint."""

    def __init__(self, jobs: int, gone: set[str], stubborn: set[str], silent: set[str]) -> None:
        super().__init__()
        self.jobs = {f"1.{proc}": 0 for proc in range(jobs)}
        self.gone, self.stubborn, self.silent = gone, stubborn, silent

    def query(self, condition: str, projection: Any = (), limit: int = -1) -> list[dict[str, Any]]:
        least = int(condition.rpartition(">= ")[2]) if ">= " in condition else 0
        there = [job.split(".") for job, expires in self.jobs.items() if expires >= least]
        return [{"ClusterId": cluster, "ProcId": proc} for cluster, proc in there]

    def _call(self, what: str, function: str, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((function, *args))
        jobs, _, value, _ = args
        if isinstance(jobs, str):
            raise EditRefused(f"{what}: the schedd refused: Unable to edit jobs matching constraint")
        for job in self.gone:
            self.jobs.pop(job, None)  # since they were asked for
        if not self.jobs.keys() >= set(jobs) or self.stubborn.intersection(jobs):
            raise EditRefused(f"{what}: the schedd refused: Unable to commit transaction")
        self.jobs |= {job: int(value) for job in jobs if job not in self.silent}
        return len(jobs)


@pytest.mark.parametrize("gone", [set(), {"1.7"}, {"1.0", "1.99"}, {f"1.{proc}" for proc in range(100)}])
def test_a_refused_renewal_is_done_by_ids(gone: set[str]) -> None:
    client = Refusing(100, gone, set(), set())
    assert client.renew(CONDITION, 60) == 100 - len(gone)
    assert all(client.jobs.values())
    assert len(client.calls) <= 3


@pytest.mark.parametrize("how", ["aloud", "silently"])
def test_what_is_not_renewed_is_told(how: str) -> None:
    """The bindings say nothing of an edit by id that the schedd refuses: only the queue shows it."""
    refused = {"1.4"}
    client = Refusing(10, set(), refused if how == "aloud" else set(), refused if how == "silently" else set())
    with pytest.raises(ScheddError, match=r"refused: Unable to edit.*\(jobs 1\.4\)"):
        client.renew(CONDITION, 60)
    assert [job for job, expires in client.jobs.items() if not expires] == ["1.4"]
