"""Tasks land on the workers of their group, by whichever way they name it, and scaling decisions are seen.

The pool is real Dask workers that offer what those of three worker groups do; the last tests have HTCondor jobs.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import distributed
import pytest
from distributed import Nanny, Scheduler, SpecCluster
from prefect import flow, get_client, tags, task
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.exceptions import MappingMissingIterable
from prefect.runtime import flow_run as flow_run_runtime

from prefect_htcdask import HTCDaskTaskRunner, UnknownWorkerGroupError, get_dask_client, worker_group
from prefect_htcdask.condor.schedd import ScheddClient
from prefect_htcdask.embedded import EmbeddedEndpoint
from prefect_htcdask.embedded.ports import free_port
from prefect_htcdask.errors import WorkerGroupError
from prefect_htcdask.runner import flow_run
from prefect_htcdask.runner.ui.decisions import scaling_line
from prefect_htcdask.runner.ui.events import FlowEvents
from prefect_htcdask.scheduler.worker_groups import OFFERS_METADATA, group_resource
from prefect_htcdask.supervisor.report.events import SCALED
from tests.support.cluster_fixtures import SMALL, jobs_of
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("prefect_api")

OFFERS = {
    "cpu": {group_resource("cpu"): 1},
    "gpu": {group_resource("gpu"): 1, "GPU": 1},
    "big": {group_resource("big"): 1},
}


@pytest.fixture(scope="module")
def grouped_pool(prefect_server: Any) -> Iterator[Any]:
    """Workers of one thread each: two of the group cpu, one of each other. They are named by their groups."""
    workers = {
        name: {"cls": Nanny, "options": {"nthreads": 1, "resources": OFFERS[name.partition("-")[0]]}}
        for name in ("cpu-0", "cpu-1", "gpu-0", "big-0")
    }
    scheduler = {"cls": Scheduler, "options": {"dashboard_address": ":0", "protocol": "tcp://", "host": "127.0.0.1"}}
    with SpecCluster(workers=workers, scheduler=scheduler) as cluster:
        yield cluster


@pytest.fixture
def runner(grouped_pool: Any, monkeypatch: pytest.MonkeyPatch) -> HTCDaskTaskRunner:
    monkeypatch.setattr(grouped_pool, "worker_offers", OFFERS, raising=False)
    return HTCDaskTaskRunner(cluster=grouped_pool)


@task
def where(_: Any = None) -> str:
    """The group of the worker that runs this."""
    return str(distributed.get_worker().name).partition("-")[0]


@task(tags=["worker-group:gpu"])
def where_by_tag(_: Any = None) -> str:
    return str(distributed.get_worker().name).partition("-")[0]


@task
async def where_async(_: Any = None) -> str:
    await asyncio.sleep(0)
    return str(distributed.get_worker().name).partition("-")[0]


def test_tasks_land_on_the_workers_of_their_group(runner: HTCDaskTaskRunner) -> None:
    @flow(task_runner=runner)
    def computing() -> dict[str, Any]:
        found = {
            "plain": where.map(range(8)),
            "tag": [where_by_tag.submit(), *where_by_tag.map(range(3))],
            "option": where.with_options(tags=["worker-group:big", "other"]).submit(),
        }
        with worker_group("big"):
            found["context"] = [where.submit(), *where.map(range(3))]
            found["context before tag"] = where_by_tag.submit()
            with worker_group("gpu"):
                found["inner context"] = where.submit()
        with tags("worker-group:gpu"):
            found["tags"] = where.map(range(3))
        with dask.annotate(resources={"GPU": 1}):
            found["annotation"] = [where.submit(), *where.map(range(3))]
        return {name: resolved(futures) for name, futures in found.items()}

    def resolved(futures: Any) -> set[str]:
        return {future.result() for future in (futures if isinstance(futures, list) else [futures])}

    assert computing() == {
        "plain": {"cpu"},
        "tag": {"gpu"},
        "option": {"big"},
        "context": {"big"},
        "context before tag": {"big"},
        "inner context": {"gpu"},
        "tags": {"gpu"},
        "annotation": {"gpu"},
    }


def test_a_mapped_graph_with_shared_data_goes_to_the_group_as_a_whole(runner: HTCDaskTaskRunner) -> None:
    @task
    def where_with(index: int, data: bytes) -> tuple[str, int]:
        return str(distributed.get_worker().name).partition("-")[0], data[index]

    @flow(task_runner=runner)
    def computing() -> Any:
        from prefect import unmapped

        with worker_group("big"):
            small = where_with.map(range(3), unmapped(bytes(range(3))))
            large = where_with.map(range(3), unmapped(bytes(range(10)) * 1_000_000))
        return small.result(), large.result()

    expected = [("big", index) for index in range(3)]
    assert computing() == (expected, expected)


def test_other_annotations_stay(runner: HTCDaskTaskRunner) -> None:
    @task
    def asked() -> tuple[dict[str, float], int]:
        worker = distributed.get_worker()
        state = worker.state.tasks[worker.get_current_task()]
        return dict(state.resource_restrictions), state.priority[0]

    @flow(task_runner=runner)
    def computing() -> Any:
        with dask.annotate(resources={"GPU": 1}, priority=7), worker_group("gpu"):
            both = asked.submit()
        with dask.annotate(priority=3):
            plain = asked.submit()
        return both.result(), plain.result()

    assert computing() == (({group_resource("gpu"): 1, "GPU": 1}, -7), ({group_resource("cpu"): 1}, -3))


async def test_async_flows_keep_their_groups_apart(runner: HTCDaskTaskRunner) -> None:
    async def submit_in(name: str) -> Any:
        with worker_group(name):
            await asyncio.sleep(0.1)
            return where_async.submit(), where.map(range(2))

    @flow(task_runner=runner)
    async def computing() -> Any:
        found = await asyncio.gather(submit_in("gpu"), submit_in("big"))
        return [[one.result(), *many.result()] for one, many in found]

    assert await computing() == [["gpu"] * 3, ["big"] * 3]


@pytest.mark.timeout(120)
def test_tasks_that_wait_for_tasks_of_their_own_group(runner: HTCDaskTaskRunner) -> None:
    @task
    def outer(_: int) -> list[str]:
        with worker_group("gpu"):
            there = where.submit()
        # As many as there are threads in the group would wait for ever, if each kept its place.
        return [*where.map(range(2)).result(), there.result(), where_by_tag.submit().result()]

    @flow(task_runner=runner)
    def computing() -> Any:
        with worker_group("big"):
            again = outer.submit(0)
        return outer.map(range(5)).result(), again.result(), where.map(range(8)).result()

    expected = ["cpu", "cpu", "gpu", "gpu"]
    assert computing() == ([expected] * 5, expected, ["cpu"] * 8)
    assert_all_resources_are_free(runner)


def assert_all_resources_are_free(runner: HTCDaskTaskRunner) -> None:
    def used(dask_worker: distributed.Worker) -> dict[str, float]:
        state = dask_worker.state
        return {name: total - state.available_resources[name] for name, total in state.total_resources.items()}

    with distributed.Client(runner._cluster, set_as_default=False) as client:
        wait_until(
            lambda: not any(any(amounts.values()) for amounts in client.run(used).values()), 10, "no resource in use"
        )


def test_inside_of_tasks_groups_are_known_too(runner: HTCDaskTaskRunner) -> None:
    @task
    def outer() -> str:
        with pytest.raises(UnknownWorkerGroupError, match=r"'where'.*'fpga'.*cpu, gpu, big"), worker_group("fpga"):
            where.submit()
        with tags("worker-group:big"):
            return where.submit().result()

    @task
    def with_tags_from_outside() -> str:
        return where.submit().result()

    @flow(task_runner=runner)
    def computing() -> Any:
        with tags("worker-group:gpu"):
            inherited = with_tags_from_outside.submit()
        with worker_group("gpu"):
            lexical = with_tags_from_outside.submit()
        return outer.submit().result(), inherited.result(), lexical.result()

    # Tags travel with a task run, as Prefect has them do; the context manager is about what it encloses.
    assert computing() == ("big", "gpu", "cpu")


def test_retries_and_subflows_stay_in_the_group(runner: HTCDaskTaskRunner) -> None:
    @task(retries=1, tags=["worker-group:big"])
    def second_time() -> str:
        from prefect.runtime import task_run

        if task_run.run_count < 2:
            raise ValueError("again")
        return str(distributed.get_worker().name).partition("-")[0]

    @flow(task_runner=runner)
    def child() -> list[str]:
        return [where.submit().result(), second_time.submit().result()]

    @flow(task_runner=runner)
    def computing() -> Any:
        with worker_group("gpu"):
            within = child()
        return within, child()

    assert computing() == (["gpu", "gpu"], ["cpu", "big"])


def test_the_scheduler_tells_what_there_is(grouped_pool: Any) -> None:
    @flow(task_runner=HTCDaskTaskRunner(address=grouped_pool.scheduler_address))
    def computing() -> Any:
        with worker_group("gpu"):
            good = where.submit()
        with pytest.raises(UnknownWorkerGroupError, match="'fpga'"), worker_group("fpga"):
            where.submit()
        return good.result(), where.map(range(6)).result()

    with distributed.Client(grouped_pool, set_as_default=False) as client:
        client.set_metadata(list(OFFERS_METADATA), OFFERS)
        try:
            assert computing() == ("gpu", ["cpu"] * 6)
        finally:
            client.set_metadata(list(OFFERS_METADATA), None)


def test_where_nobody_tells_what_there_is_nothing_is_checked(grouped_pool: Any) -> None:
    @flow(task_runner=HTCDaskTaskRunner(address=grouped_pool.scheduler_address))
    def computing() -> Any:
        with worker_group("big"):
            return where.submit().result(), where_by_tag.submit().result()

    assert computing() == ("big", "big")


def test_an_error_at_submit_leaves_nothing_behind(runner: HTCDaskTaskRunner) -> None:
    @flow(task_runner=runner)
    def computing() -> Any:
        with worker_group("fpga"):
            with pytest.raises(UnknownWorkerGroupError, match=r"'where'.*'fpga'.*cpu, gpu, big"):
                where.submit()
            with pytest.raises(UnknownWorkerGroupError):
                where.map(range(3))
            with pytest.raises(MappingMissingIterable):
                where.map(1)  # type: ignore[arg-type]
        with pytest.raises(UnknownWorkerGroupError, match="GPU=2"), dask.annotate(resources={"GPU": 2}):
            where.submit()
        with pytest.raises(WorkerGroupError, match="several"), tags("worker-group:big"):
            where_by_tag.submit()
        run = flow_run.find(str(flow_run_runtime.id))
        assert run is not None and run.unfinished() == [] and run.submitter.metadata_keys() == []
        return flow_run_runtime.id, where.submit().result()

    flow_run_id, good = computing()
    assert good == "cpu"
    with get_client(sync_client=True) as client:
        one = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
        runs = wait_until(lambda: client.read_task_runs(flow_run_filter=one), 20, "the one task run")
    assert len(runs) == 1


def test_an_error_at_submit_comes_before_anything_is_provisioned(monkeypatch: pytest.MonkeyPatch) -> None:
    # Were anything to be started, this setting would be the error.
    groups = {"cpu": {"memory": "1 GiB"}, "gpu": {"gpus": 1, "resources": {"licence": 2}}}
    gatewayless = HTCDaskTaskRunner(
        workers=groups,
        embedded={"enabled": False},
        gateway={"address": f"http://127.0.0.1:{free_port()}"},
        condor={"config_file": "/none"},
    )

    @flow(task_runner=gatewayless)
    def computing() -> None:
        with pytest.raises(UnknownWorkerGroupError, match=r"'where'.*'fpga'.*cpu, gpu"), worker_group("fpga"):
            where.submit()
        with pytest.raises(UnknownWorkerGroupError, match="licence=2"), dask.annotate(resources={"licence": 3}):
            where.map(range(3))
        assert flow_run.find(str(flow_run_runtime.id)) is None

    computing()


def test_a_runner_without_groups_has_but_the_one() -> None:
    @flow(task_runner=HTCDaskTaskRunner(embedded={"enabled": False}))
    def computing() -> None:
        with pytest.raises(UnknownWorkerGroupError, match=r"'gpu'.*there is default.*workers="):
            where_by_tag.submit()

    computing()


def decision(**changes: Any) -> dict[str, Any]:
    text = "12 queued, 4 running, 0 pending: +8 cpu"
    return {"kind": "decision", "group": "cpu", "target": 12, "submit": 8, "remove": 0, "text": text, **changes}


def test_a_decision_is_a_line_in_the_log_and_an_event(runner: HTCDaskTaskRunner) -> None:
    @flow(task_runner=runner)
    def computing() -> Any:
        where.submit().wait()
        run = flow_run.find(str(flow_run_runtime.id))
        assert run is not None
        run.on_message(decision())
        run.on_message(decision(target=10, submit=0, text="nothing to do"))
        run.on_message(decision(group="gpu", target=0, submit=0, remove=2, text="0 queued, 2 idle: -2 gpu"))
        return flow_run_runtime.id, flow_run_runtime.name

    flow_run_id, name = computing()
    lines = wait_until(lambda: found if len(found := scaling_lines(flow_run_id)) > 1 else None, 20, "lines of the log")
    assert lines == [
        "Scaling workers: 12 queued, 4 running, 0 pending: +8 cpu",
        "Scaling workers: 0 queued, 2 idle: -2 gpu",
    ]
    events = wait_until(lambda: found if len(found := events_of(flow_run_id)) > 1 else None, 20, "events at the API")
    assert [event["payload"] for event in events] == [
        {"group": "cpu", "target": 12, "submit": 8, "remove": 0, "reason": "12 queued, 4 running, 0 pending: +8 cpu"},
        {"group": "gpu", "target": 0, "submit": 0, "remove": 2, "reason": "0 queued, 2 idle: -2 gpu"},
    ]
    resource = events[0]["resource"]
    assert resource["prefect.resource.id"].startswith("htcdask.worker-group.")
    assert resource["prefect.resource.id"].endswith(".cpu")
    related = {one["prefect.resource.role"]: one for one in events[0]["related"]}
    assert related["flow-run"]["prefect.resource.id"] == f"prefect.flow-run.{flow_run_id}"
    assert related["flow-run"]["prefect.resource.name"] == name
    assert related["flow"]["prefect.resource.name"] == "computing"


AWAY = """
import contextvars, time
from prefect_htcdask.runner.ui.events import FlowEvents

events = FlowEvents("cluster", contextvars.copy_context())
began = time.monotonic()
for _ in range(20):
    events.scaled({"kind": "decision", "group": "cpu", "target": 1, "submit": 1, "remove": 0, "text": "why"})
emitted = time.monotonic()
print(events.flush(timeout=0.5), emitted - began < 5, time.monotonic() - emitted < 3)
"""


def test_an_api_that_is_away_delays_no_decision() -> None:
    # In a process of its own: Prefect has one sender of events per process, whatever the API's address.
    environment = {**os.environ, "PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api"}
    done = subprocess.run([sys.executable, "-c", AWAY], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, ["False", "True", "True"]), done.stderr


def test_what_a_decision_says_cannot_break_the_flow() -> None:
    events = FlowEvents("cluster", contextvars.copy_context())
    events.scaled({"kind": "decision", "target": "many"})
    assert events.flush()
    assert scaling_line({"kind": "decision", "text": "why"}) == "Scaling workers: why"
    assert scaling_line(decision(submit=0)) is None


def scaling_lines(flow_run_id: Any) -> list[str]:
    """What the flow run's log at the API says of scaling, in order."""
    with get_client(sync_client=True) as client:
        logs = client.read_logs(log_filter=LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id])))
    return [log.message for log in sorted(logs, key=lambda log: log.timestamp) if "Scaling" in log.message]


def events_of(flow_run_id: Any) -> list[dict[str, Any]]:
    """Our events at the API that are related to a flow run, in order."""
    related = {"id": [f"prefect.flow-run.{flow_run_id}"]}
    with get_client(sync_client=True) as client:
        answer = client._client.post(
            "/events/filter", json={"filter": {"event": {"name": [SCALED]}, "related": related}, "limit": 50}
        )
        answer.raise_for_status()
    return sorted(answer.json()["events"], key=lambda event: event["occurred"])


@pytest.mark.pool
@pytest.mark.timeout(240)
def test_groups_of_jobs_scale_each_on_its_own_queue(
    condor_environment: EmbeddedEndpoint, queue: ScheddClient, tmp_path: Path
) -> None:
    groups = {
        "cpu": {**SMALL, "maximum": 2},
        "big": {**SMALL, "memory": "600 MiB", "maximum": 1, "resources": {"licence": 1}},
    }
    seen = tmp_path / "workers"  # beside what is kept of the run
    seen.mkdir()

    @task
    def job(together: int = 1) -> dict[str, str]:
        """What the ad of this worker's job says; with several workers, no task ends before each has one."""
        ad = Path(os.environ["_CONDOR_JOB_AD"]).read_text()
        (seen / distributed.get_worker().name).touch()
        wait_until(lambda: len(list(seen.iterdir())) >= together, 120, "a task on each worker")
        return dict(line.split(" = ", 1) for line in ad.splitlines() if " = " in line)

    @task
    def nested() -> dict[str, str]:
        with worker_group("big"):
            return job.submit().result()

    @flow(task_runner=HTCDaskTaskRunner(workers=groups))
    def computing() -> Any:
        with pytest.raises(UnknownWorkerGroupError, match=r"'gpu'.*cpu, big"), worker_group("gpu"):
            job.submit()
        assert jobs_of(queue) == []
        plain = job.map([3] * 6)
        with worker_group("big"):
            named = job.map([3] * 2)
        with dask.annotate(resources={"licence": 1}):
            annotated = job.submit()
        inside = nested.submit()
        with get_dask_client() as client:
            offers = client.get_metadata(list(OFFERS_METADATA), default=None)
        return plain.result(), [*named.result(), annotated.result(), inside.result()], offers, flow_run_runtime.id

    in_cpu, in_big, offers, flow_run_id = computing()
    for ads, name, memory, workers in ((in_cpu, "cpu", 300, 2), (in_big, "big", 600, 1)):
        assert {ad["HTCDaskWorkerGroup"] for ad in ads} == {f'"{name}"'}
        assert {ad["RequestMemory"] for ad in ads} == {str(memory)}
        assert len({(ad["ClusterId"], ad["ProcId"]) for ad in ads}) == workers
    assert list(offers) == ["cpu", "big"] and offers["big"] == {group_resource("big"): 1, "licence": 1}

    wait_until(lambda: jobs_of(queue) == [], 30, "no job left")
    lines = wait_until(lambda: found if len(found := scaling_lines(flow_run_id)) > 1 else None, 20, "lines of the log")
    assert any(line.endswith("+2 cpu") for line in lines) and any(line.endswith("+1 big") for line in lines), lines

    def started() -> set[tuple[str, int]]:
        told = [event["payload"] for event in events_of(flow_run_id)]
        return {(one["group"], one["submit"]) for one in told if one["submit"]}

    wait_until(lambda: started() == {("cpu", 2), ("big", 1)}, 20, "an event of each group at the API")
