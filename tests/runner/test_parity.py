"""`DaskTaskRunner` is the judge: the same flow leaves the same task runs behind, field by field."""

from __future__ import annotations

import time
from typing import Any

import distributed
import pytest
from prefect import flow, get_client, tags, task
from prefect.assets import materialize
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.runtime import flow_run as flow_run_runtime
from prefect.utilities.annotations import unmapped
from prefect_dask import DaskTaskRunner

from prefect_htcdask import HTCDaskTaskRunner

pytestmark = pytest.mark.usefixtures("prefect_api")

VARYING = {
    # What differs from one run of a flow to the next, whatever the runner.
    "id", "created", "updated", "flow_run_id", "dynamic_key", "state_id", "state", "start_time", "end_time",
    "expected_start_time", "total_run_time", "estimated_run_time", "estimated_start_time_delta", "name",
    "cache_expiration", "labels",
}  # fmt: skip


@task(name="make", tags=["made"])
def make(x: int) -> list[int]:
    return [x]


@task(retries=1, retry_delay_seconds=0.0, task_run_name="second-{x}")
def second_time(x: int) -> int:
    from prefect.runtime import task_run

    if task_run.run_count < 2:
        raise ValueError("once more")
    return x


@task
def broken() -> None:
    raise ValueError("broken")


@task
def join(a: Any, b: Any = None, **more: Any) -> Any:
    return a


@task
def outer() -> int:
    return len(make.submit(9).result())


@materialize("file:///made")
def asset(a: Any) -> int:
    return 1


def _flow(runner: Any) -> Any:
    @flow(task_runner=runner)
    def everything() -> str:
        first = make.submit(1)
        with tags("outer"):
            mapped = make.map([1, 2])
        again = second_time.submit(3)
        bad = broken.submit()
        after = join.submit(bad)
        joined = join.submit(first, {"deep": [mapped[0]]}, extra=mapped[1], wait_for=[again])
        fanned = join.map(mapped, unmapped(first), wait_for=[again])
        nested = outer.submit()
        made = asset.submit(first)
        used = join.submit(made)
        for future in (joined, *fanned, after, nested, used):
            future.wait()
        return str(flow_run_runtime.id)

    return everything


def _task_runs(flow_run_id: str, count: int) -> list[Any]:
    deadline = time.monotonic() + 30
    with get_client(sync_client=True) as client:
        while True:
            runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])))
            if len(runs) == count and all(run.state_name in ("Completed", "Failed", "NotReady") for run in runs):
                return runs
            assert time.monotonic() < deadline, sorted((run.name, run.state_name) for run in runs)
            time.sleep(0.2)


def _described(runs: list[Any], history: dict[Any, Any]) -> list[Any]:
    """The task runs without what varies; inputs name the task that they come from instead of its id."""
    names = {run.id: run.task_key for run in runs}

    def described(run: Any) -> dict[str, Any]:
        fields = run.model_dump(mode="json", exclude=VARYING)
        fields["task_inputs"] = {
            name: sorted(names.get(item.id, "elsewhere") if hasattr(item, "id") else str(item) for item in items)
            for name, items in sorted(run.task_inputs.items())
        }
        fields["tags"] = sorted(run.tags)
        fields["named"] = run.name.rpartition("-")[0]
        fields["state"] = (run.state.type.value, run.state.name, _no_ids(run.state.message))
        fields["times"] = (run.start_time is not None, run.end_time is not None, run.expected_start_time is not None)
        fields["history"] = history[run.id]
        return fields

    return sorted((described(run) for run in runs), key=repr)


def _no_ids(message: str | None) -> str | None:
    import re

    return re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "ID", message) if message else message


def _histories(runs: list[Any]) -> dict[Any, list[tuple[str, str]]]:
    found: dict[Any, list[tuple[str, str]]] = {}
    with get_client(sync_client=True) as client:
        for run in runs:
            answer = client._client.get("/task_run_states/", params={"task_run_id": str(run.id)}).json()
            states = sorted(answer, key=lambda state: state["timestamp"])
            found[run.id] = [(state["type"], state["name"]) for state in states]
    return found


def test_task_runs_are_those_that_prefect_dask_leaves(local_pool: distributed.LocalCluster) -> None:
    described = []
    for runner in (DaskTaskRunner(address=local_pool.scheduler_address), HTCDaskTaskRunner(cluster=local_pool)):
        runs = _task_runs(_flow(runner)(), count=13)
        time.sleep(1)
        described.append(_described(runs, _histories(runs)))
    theirs, ours = described
    for one, other in zip(theirs, ours, strict=True):
        assert other == one
