"""Tasks that leave a mark each time that they run."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from prefect import get_client, task
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from tests.support.waiting import wait_until


@task
def gated(directory: Path, name: str) -> str:
    """Leaves a mark each time that it runs, and runs until it is let go."""
    with (directory / name).open("a") as stream:
        stream.write(f"{os.getpid()}\n")
    while not (directory / f"{name}.go").exists():
        time.sleep(0.02)
    return name


@task
def marked(directory: Path, name: str, size: int = 0) -> tuple[int, bytes]:
    """Leaves a mark each time that it runs; returns its process."""
    with (directory / name).open("a") as stream:
        stream.write(f"{os.getpid()}\n")
    return os.getpid(), b"x" * size


@task
def after(first: Any, directory: Path, name: str) -> Any:
    """Needs what another task returned; leaves a mark."""
    (directory / name).touch()
    return first


def runs(directory: Path, name: str) -> list[int]:
    """The processes in which a task ran, in order."""
    path = directory / name
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def history(flow_run_id: Any, name: str, until: str = "Completed") -> tuple[Any, list[tuple[str, str]]]:
    """The flow run's only task run of a task, once it is in a state, with names and messages of all its states."""

    def look() -> Any:
        found = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])))
        of_task = [run for run in found if run.task_key.partition("-")[0] == name]
        return of_task if [run.state_name for run in of_task] == [until] else None

    with get_client(sync_client=True) as client:
        (run,) = wait_until(look, 60, f"{name} is {until}")
        answer = client._client.get("/task_run_states/", params={"task_run_id": str(run.id)}).json()
    states = sorted(answer, key=lambda state: state["timestamp"])
    return run, [(state["name"], state["message"] or "") for state in states]
