"""After many tasks at once, the API shows what `DaskTaskRunner` leaves: every task run, state, time, log and event.

`test_runner_parity` compares what one flow of many kinds of tasks leaves; here it is what speed could cost: nothing may
be lost, doubled, or out of order.
"""

from __future__ import annotations

import re
from collections import Counter
from datetime import datetime, timedelta
from typing import Any

import distributed
import httpx
import pytest
from prefect import flow, get_run_logger, tags, task
from prefect.runtime import flow_run as flow_run_runtime
from prefect.utilities.annotations import unmapped
from prefect_dask import DaskTaskRunner

from prefect_htcdask import HTCDaskTaskRunner
from tests.support.prefect_fixtures import PrefectServer
from tests.support.waiting import wait_until

TASKS = 40
IDS = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
DYNAMIC = {
    # Ids and clock times, which are compared apart, by what holds between them.
    "id", "created", "updated", "flow_run_id", "dynamic_key", "state_id", "state", "start_time", "end_time",
    "expected_start_time", "total_run_time", "estimated_run_time", "estimated_start_time_delta", "task_inputs",
}  # fmt: skip


@task(name="counted", tags=["kept"], task_run_name="item-{x}", log_prints=True)
def counted(x: int, factor: int) -> int:
    get_run_logger().warning("item %s by %s", x, factor)
    print("printed", x)
    return x * factor


@task(task_run_name="again-{x}", retries=1, retry_delay_seconds=0.0)
def at_second_try(x: int) -> int:
    from prefect.runtime import task_run

    get_run_logger().info("try %s of %s", task_run.run_count, x)
    if task_run.run_count < 2:
        raise ValueError("once more")
    return x


@task(task_run_name="sum")
def total(numbers: list[int]) -> int:
    return sum(numbers)


def _left_by(runner: Any, api: httpx.Client) -> dict[str, Any]:
    @flow(task_runner=runner)
    def many() -> str:
        with tags("outer"):
            first = counted.map(range(TASKS), unmapped(2))
        again = at_second_try.map(range(5))
        assert total.submit(first, wait_for=again).result() == TASKS * (TASKS - 1)
        return str(flow_run_runtime.id)

    flow_run_id = many()
    runs = wait_until(lambda: _ended(api, flow_run_id, TASKS + 6), 60, "every task run has ended, as the API has it")
    names = {run["id"]: run["name"] for run in runs}
    histories = {run["id"]: _history(api, run["id"]) for run in runs}
    # Each state has an event. A task run says three lines here, one that is tried twice four, and the sum one.
    states, lines = sum(map(len, histories.values())), 3 * TASKS + 4 * 5 + 1
    wait_until(lambda: len(_events(api, flow_run_id)) >= states, 60, f"{states} events are there")
    wait_until(lambda: len(_logs(api, flow_run_id)) >= lines, 60, f"{lines} lines of logs are there")
    return {
        "runs": {run["name"]: _fields(run, names, flow_run_id) for run in runs},
        "times": {run["name"]: _times(run, histories[run["id"]]) for run in runs},
        "states": {names[id_]: [_state(state) for state in history] for id_, history in histories.items()},
        "logs": _said(_logs(api, flow_run_id), names),
        "events": _emitted(_events(api, flow_run_id), names),
        "count": len(runs),
    }


def _ended(api: httpx.Client, flow_run_id: str, count: int) -> list[dict[str, Any]]:
    found = _pages(api, "/task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run_id]}}, "sort": "ID_DESC"})
    ended = [run for run in found if run["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")]
    return ended if len(ended) == len(found) >= count else []


def _pages(api: httpx.Client, path: str, query: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while True:
        page = api.post(path, json={**query, "limit": 200, "offset": len(found)}).raise_for_status().json()
        found += page
        if len(page) < 200:
            return found


def _logs(api: httpx.Client, flow_run_id: str) -> list[dict[str, Any]]:
    lines = _pages(api, "/logs/filter", {"logs": {"flow_run_id": {"any_": [flow_run_id]}}, "sort": "TIMESTAMP_ASC"})
    return [line for line in lines if line["task_run_id"] is not None]


def _events(api: httpx.Client, flow_run_id: str) -> list[dict[str, Any]]:
    query = {
        "filter": {"event": {"prefix": ["prefect.task-run."]}, "related": {"id": [f"prefect.flow-run.{flow_run_id}"]}},
        "limit": 50,
    }
    page = api.post("/events/filter", json=query).raise_for_status().json()
    found = list(page["events"])
    while page["next_page"]:
        page = api.get(page["next_page"]).raise_for_status().json()
        found += page["events"]
    return found


def _history(api: httpx.Client, task_run_id: str) -> list[dict[str, Any]]:
    answer = api.get("/task_run_states/", params={"task_run_id": task_run_id}).raise_for_status().json()
    return sorted(answer, key=lambda state: state["timestamp"])


def _fields(run: dict[str, Any], names: dict[str, str], flow_run_id: str) -> dict[str, Any]:
    fields = {name: value for name, value in run.items() if name not in DYNAMIC}
    fields["tags"] = sorted(run["tags"])
    fields["inputs"] = {
        name: sorted(names.get(item.get("id", ""), item["input_type"]) for item in items)
        for name, items in sorted(run["task_inputs"].items())
    }
    fields["of_flow_run"] = run["flow_run_id"] == flow_run_id
    return _plain(fields)


def _times(run: dict[str, Any], history: list[dict[str, Any]]) -> dict[str, bool]:
    """What holds between a task run's times and those of its states."""
    at = [datetime.fromisoformat(state["timestamp"]) for state in history]
    running = [when for when, state in zip(at, history, strict=True) if state["type"] == "RUNNING"]
    start, end, expected = (datetime.fromisoformat(run[f"{name}_time"]) for name in ("start", "end", "expected_start"))
    return {
        "starts when it first runs": start == running[0],
        "ends with its last state": end == at[-1],
        "is expected no later than it starts": expected <= start,
        "is expected when it is first heard of": abs(expected - at[0]) < timedelta(seconds=1),
        "ran as long as it was running": 0 < run["total_run_time"] <= (end - start).total_seconds() + 1e-3,
        "is in its last state": run["state_id"] == history[-1]["id"],
        "has states of its own": len({state["id"] for state in history}) == len(history),
    }


def _state(state: dict[str, Any]) -> dict[str, Any]:
    details = {name: value for name, value in state["state_details"].items() if value is not None}
    return _plain({"type": state["type"], "name": state["name"], "message": state["message"], "details": details})


def _said(lines: list[dict[str, Any]], names: dict[str, str]) -> Counter[Any]:
    return Counter((names[line["task_run_id"]], line["level"], line["name"], _plain(line["message"])) for line in lines)


def _emitted(events: list[dict[str, Any]], names: dict[str, str]) -> Counter[Any]:
    """Events, each by its task run, without ids; one that follows another says so."""
    return Counter(
        (
            names[event["resource"]["prefect.resource.id"].removeprefix("prefect.task-run.")],
            event["event"],
            event["follows"] is not None,
            tuple(sorted(event["resource"])),
            tuple(sorted((one["prefect.resource.role"], _kind(one)) for one in event["related"])),
            tuple(sorted(event["payload"])),
        )
        for event in events
    )


def _kind(resource: dict[str, str]) -> str:
    return str(_plain(resource["prefect.resource.id"]))


def _plain(value: Any) -> Any:
    """The same without ids and clock times, which differ from one flow run to the next."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+(Z|\+00:00)", "TIME", IDS.sub("ID", value))
    return value


@pytest.fixture(scope="module")
def left(prefect_server: PrefectServer, local_pool: distributed.LocalCluster) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `DaskTaskRunner` leaves, and what ours does, after the same flow on the same workers."""
    with httpx.Client(base_url=prefect_server.url, timeout=60) as api:
        return (
            _left_by(DaskTaskRunner(address=local_pool.scheduler_address), api),
            _left_by(HTCDaskTaskRunner(address=local_pool.scheduler_address), api),
        )


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize("what", ["count", "runs", "states", "logs", "events"])
def test_the_api_shows_what_prefect_dask_leaves(left: tuple[dict[str, Any], dict[str, Any]], what: str) -> None:
    theirs, ours = left
    assert ours[what] == theirs[what]


@pytest.mark.usefixtures("prefect_api")
def test_no_task_run_log_or_event_is_lost_or_doubled(left: tuple[dict[str, Any], dict[str, Any]]) -> None:
    _, ours = left
    assert ours["count"] == TASKS + 6
    assert ours["runs"].keys() == {f"item-{x}" for x in range(TASKS)} | {f"again-{x}" for x in range(5)} | {"sum"}
    histories = {name: [state["name"] for state in states] for name, states in ours["states"].items()}
    for x in range(TASKS):
        assert histories[f"item-{x}"] == ["Pending", "Running", "Completed"]
        assert ours["logs"][f"item-{x}", 30, "prefect.task_runs", f"item {x} by 2"] == 1
        assert ours["logs"][f"item-{x}", 20, "prefect.task_runs", f"printed {x}"] == 1
    for x in range(5):
        assert [ours["logs"][f"again-{x}", 20, "prefect.task_runs", f"try {number} of {x}"] for number in (1, 2)] == [
            1,
            1,
        ]
    assert set(ours["events"].values()) == {1}
    assert sum(ours["events"].values()) == sum(map(len, histories.values()))


@pytest.mark.usefixtures("prefect_api")
def test_times_agree_with_the_states(left: tuple[dict[str, Any], dict[str, Any]]) -> None:
    theirs, ours = left
    assert ours["times"] == theirs["times"]
    assert {name for times in ours["times"].values() for name, holds in times.items() if not holds} == set()
