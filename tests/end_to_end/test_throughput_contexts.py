"""The context of a flow run is described and hydrated once for all of its tasks, and each task run has it to itself."""

from __future__ import annotations

from typing import Any

import distributed
import pytest
from prefect import flow, task
from prefect.runtime import flow_run as flow_run_runtime
from prefect.settings import PREFECT_TASK_DEFAULT_RETRIES, temporary_settings
from prefect_dask import DaskTaskRunner

from prefect_htcdask import HTCDaskTaskRunner

pytestmark = pytest.mark.usefixtures("prefect_api")

TASKS = 20
LARGE = 100_000
"""Bytes; more than is sent along with the context (`descriptions.INLINE_LIMIT`)."""


def hydrated(dask_worker: distributed.Worker) -> tuple[int, int]:
    """How many envelopes and contexts this worker process keeps; runs there."""
    from prefect_htcdask.worker import context_cache

    return len(context_cache.envelopes), len(context_cache.contexts)


def described(dask_scheduler: distributed.Scheduler) -> dict[str, list[int]]:
    """The sizes of what each flow run has left at the scheduler; runs there."""
    left = dask_scheduler.task_metadata.get("prefect_htcdask", {})
    return {run: sorted(map(len, blobs.values())) for run, blobs in left.items() if blobs}


@task
def number(x: int) -> int:
    return x


@task
def change_parameters(by: int) -> tuple[list[int], int]:
    """What the flow run's parameters are, before this task run changes its copy of them."""
    parameters = flow_run_runtime.parameters
    seen = list(parameters["items"])
    parameters["items"].append(by)
    return seen, len(parameters["large"])


@task
def change_from_below(by: int) -> list[tuple[list[int], int]]:
    """The same, in further task runs."""
    return [change_parameters.submit(by + 1).result(), change_parameters.submit(by + 2).result()]


@pytest.fixture(scope="module")
def workers(prefect_server: Any) -> Any:
    """Workers that no other test has used."""
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=True, dashboard_address=None) as cluster:
        yield cluster


def test_tasks_of_a_flow_run_share_its_context(workers: distributed.LocalCluster) -> None:
    address = workers.scheduler_address

    @flow(task_runner=HTCDaskTaskRunner(address=address))
    def many_tasks(large: bytes) -> Any:
        futures = [number.with_options(name=f"number-{one}").submit(one) for one in range(TASKS)]
        answers = [future.result() for future in futures]
        with distributed.Client(address, set_as_default=False) as client:
            kept = client.run(hydrated)
            left = client.run_on_scheduler(described)[str(flow_run_runtime.id)]
        return answers, list(kept.values()), left

    answers, kept, left = many_tasks(b"x" * LARGE)
    assert answers == list(range(TASKS))
    assert kept == [(TASKS, 1)]
    # The context, the flow run's parameters, and the tasks.
    assert len(left) == TASKS + 2
    # The context has them once more: as the API knows them, in the flow run's own record.
    assert sum(size >= LARGE for size in left) == 2


def test_what_a_task_run_does_to_the_flow_s_parameters_stays_with_it(local_pool: distributed.LocalCluster) -> None:
    def seen_by(runner: Any) -> Any:
        @flow(task_runner=runner)
        def with_parameters(items: list[int], large: bytes) -> Any:
            mine = [change_parameters.submit(by).result() for by in range(4)]
            return mine, change_from_below.submit(10).result(), items

        return with_parameters([0], b"x" * LARGE)

    theirs = seen_by(DaskTaskRunner(address=local_pool.scheduler_address))
    assert seen_by(HTCDaskTaskRunner(address=local_pool.scheduler_address)) == theirs
    assert theirs == ([([0], LARGE)] * 4, [([0], LARGE)] * 2, [0])


def test_settings_changed_in_the_flow_hold_for_what_is_submitted_then(local_pool: distributed.LocalCluster) -> None:
    @task
    def default_retries() -> int:
        from prefect.settings import get_current_settings

        return get_current_settings().tasks.default_retries

    @flow(task_runner=HTCDaskTaskRunner(address=local_pool.scheduler_address))
    def changing() -> list[int]:
        before = default_retries.submit()
        with temporary_settings({PREFECT_TASK_DEFAULT_RETRIES: 7}):
            changed = default_retries.submit()
        after = default_retries.submit()
        return [future.result() for future in (before, changed, after)]

    assert changing() == [0, 7, 0]
