"""Jobs whose input is spooled: what the queue shows meanwhile, and what becomes of them where it fails."""

from __future__ import annotations

from typing import Any

import pytest

from prefect_htcdask.cleanup.jobs import _worker_job
from prefect_htcdask.condor.address import ScheddAddress
from prefect_htcdask.condor.schedd import ScheddClient, ScheddError


class Submitted:
    """What the bindings return of a submit."""

    def cluster(self) -> int:
        return 7

    def first_proc(self) -> int:
        return 0

    def num_procs(self) -> int:
        return 2


def test_jobs_whose_input_could_not_be_spooled_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of the bindings are stand-ins: a schedd that takes jobs and then fails at their input."""
    calls: list[tuple[Any, ...]] = []

    def call(self: ScheddClient, what: str, method: str, *args: Any, **options: Any) -> Any:
        calls.append((method, *args))
        if method == "spool":
            raise ScheddError("the connection was reset")
        return Submitted() if method == "submit" else {"TotalSuccess": 2}

    monkeypatch.setattr(ScheddClient, "_call", call)
    client = ScheddClient(ScheddAddress(spool=True))
    with pytest.raises(ScheddError, match="the connection was reset"):
        client.submit({"executable": "/bin/true"}, 2)
    assert [method for method, *_ in calls] == ["submit", "spool", "act"]
    assert calls[-1][2] == ["7.0", "7.1"]


@pytest.mark.parametrize(("code", "state", "category"), [(16, "idle", ""), (13, "held", "held_transfer")])
def test_a_job_whose_input_is_on_its_way_is_well(code: int, state: str, category: str) -> None:
    job = _worker_job({"ClusterId": 7, "ProcId": 0, "JobStatus": 5, "HoldReasonCode": code, "HoldReason": "Spooling"})
    assert (job.state, job.category, job.is_well) == (state, category, code == 16)
