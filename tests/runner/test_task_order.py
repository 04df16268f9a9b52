"""Tasks run in the order in which they were submitted, where nothing else decides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed
import pytest
from prefect import flow, task, unmapped

from prefect_htcdask import HTCDaskTaskRunner
from prefect_htcdask.runner.submit import submitter

pytestmark = pytest.mark.usefixtures("prefect_api")

COUNT = 30


@pytest.fixture(scope="module")
def one_worker() -> Iterator[distributed.LocalCluster]:
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0"
    ) as cluster:
        yield cluster


@pytest.fixture
def note(tmp_path: Path) -> Path:
    return tmp_path / "order"


@task
def write(index: int, note: Path, ballast: Any = None) -> None:
    with note.open("a") as file:
        file.write(f"{index}\n")


def order_of(note: Path) -> list[int]:
    return [int(line) for line in note.read_text().split()]


@pytest.mark.parametrize("limit", [submitter.METADATA_LIMIT, 0], ids=["small ballast", "ballast as a task of its own"])
def test_a_map_runs_its_tasks_in_order_over_all_its_graphs(
    one_worker: distributed.LocalCluster, note: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submitter, "MAP_BATCH", 8)
    monkeypatch.setattr(submitter, "METADATA_LIMIT", limit)

    @flow(task_runner=HTCDaskTaskRunner(cluster=one_worker))
    def computing() -> None:
        write.map(range(COUNT), note=unmapped(note), ballast=unmapped("much")).wait()

    computing()
    assert order_of(note) == list(range(COUNT))


def test_submits_run_in_order(one_worker: distributed.LocalCluster, note: Path) -> None:
    @flow(task_runner=HTCDaskTaskRunner(cluster=one_worker))
    def computing() -> None:
        for future in [write.submit(index, note) for index in range(COUNT)]:
            future.wait()

    computing()
    assert order_of(note) == list(range(COUNT))
