"""Futures that nobody asked for anything until their flow run had ended: the Prefect API is asked then."""

from __future__ import annotations

import time
from typing import Any

import distributed
import pytest
from prefect import flow, task
from prefect.client.schemas.objects import StateType
from prefect.exceptions import MissingResult
from prefect.futures import as_completed
from prefect.runtime import flow_run

from prefect_htcdask import HTCDaskError, HTCDaskTaskRunner
from prefect_htcdask.runner import flow_run as sessions
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("prefect_api")


@task
def double(x: int) -> int:
    return 2 * x


@task(persist_result=True)
def kept_double(x: int) -> int:
    return 2 * x


@task
def fails() -> None:
    raise ValueError("no luck")


@task
def nap(seconds: float) -> None:
    time.sleep(seconds)


@pytest.fixture
def left(local_pool: distributed.LocalCluster) -> dict[str, Any]:
    """Futures of a flow run that has ended, none of which was asked for anything."""
    futures: dict[str, Any] = {}

    @flow(task_runner=HTCDaskTaskRunner(cluster=local_pool))
    def leaving() -> str:
        futures.update(plain=double.submit(1), kept=kept_double.submit(2), failed=fails.submit())
        wait_until(lambda: not any(one.is_pending() for one in futures.values()), 60, "all have ended")
        assert all(one.packed is None for one in futures.values())
        return "done"

    assert leaving() == "done"
    return futures


def test_their_states_are_those_of_the_api(left: dict[str, Any]) -> None:
    ended = {"plain": StateType.COMPLETED, "kept": StateType.COMPLETED, "failed": StateType.FAILED}
    for name, future in left.items():
        wait_until(lambda future=future: future.state.is_final(), 20, f"{name}: a final state")
        assert future.state.type == ended[name]


def test_results_that_were_persisted_are_there_and_the_others_are_said_to_be_missing(left: dict[str, Any]) -> None:
    assert left["kept"].result(timeout=20) == 4
    with pytest.raises(MissingResult):
        left["plain"].result(timeout=20)
    with pytest.raises(Exception, match="no luck"):
        left["failed"].result(timeout=20)


def test_who_waits_for_them_is_answered(left: dict[str, Any]) -> None:
    assert set(as_completed(list(left.values()), timeout=30)) == set(left.values())
    assert all(future.packed is not None for future in left.values())


def test_a_failed_cluster_is_the_reason_afterwards_too(local_pool: distributed.LocalCluster) -> None:
    futures: list[Any] = []

    @flow(task_runner=HTCDaskTaskRunner(cluster=local_pool))
    def failing() -> None:
        futures.append(nap.submit(60))
        run = sessions.find(str(flow_run.id))
        assert run is not None
        run.on_message({"kind": "failed", "text": "300 jobs wait, none starts"})

    failing(return_state=True)
    with pytest.raises(HTCDaskError, match="300 jobs wait"):
        futures[0].result(timeout=20)
    assert futures[0].state.is_crashed()
