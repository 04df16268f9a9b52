"""The flow of the fault matrix. A copy of this file runs by itself, or as a deployment, beside its `order.json`.

Each execution of a task leaves a line in a file named as the task, so that what ran again can be counted.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.runtime import flow_run

from prefect_htcdask import HTCDaskTaskRunner, with_cleanup

ORDER: dict[str, Any] = json.loads(Path(__file__).with_name("order.json").read_text())
MARKS = ORDER["marks"]


def mark(name: str) -> int:
    """Leave word of this execution; returns how many there were before."""
    path = Path(MARKS) / name
    before = len(path.read_text().splitlines()) if path.exists() else 0
    with path.open("a") as stream:
        stream.write(f"{os.getpid()} {os.environ.get('_CONDOR_SCRATCH_DIR')} {time.time()}\n")
    return before


def tell(word: str, **what: Any) -> None:
    """Tell those who watch, whole or not at all."""
    path = Path(MARKS) / f"{word}.json"
    path.with_suffix(".part").write_text(json.dumps({"time": time.time(), "pid": os.getpid(), **what}))
    path.with_suffix(".part").rename(path)


@task
def quick(name: str) -> str:
    """Has its result collected before anything is broken."""
    mark(name)
    return f"result of {name}"


@task
def gated(name: str) -> str:
    """Runs until all is let go."""
    mark(name)
    while not (Path(MARKS) / "go").exists():
        time.sleep(0.05)
    return name


@task
def hog(name: str) -> str:
    """Takes more memory than its worker has: always, or the first time only."""
    if mark(name) == 0 or not ORDER["once"]:
        taken = []
        while True:
            taken.append(bytearray(os.urandom(1 << 20)) * 20)
            time.sleep(0.1)
    return name


@task
def fill(name: str) -> str:
    """Writes more than the scratch disk of its job holds: always, or the first time only."""
    if mark(name) == 0 or not ORDER["once"]:
        with open(Path(os.environ["_CONDOR_SCRATCH_DIR"]) / "big", "wb") as stream:
            for _ in range(ORDER["fill_mib"]):
                stream.write(bytes(1 << 20))
    return name


@task
def chatty(name: str) -> str:
    """Writes line after line to its worker's stderr, until all is let go."""
    mark(name)
    while not (Path(MARKS) / "go").exists():
        print("a line of what the worker writes", file=sys.stderr, flush=True)
        time.sleep(0.1)
    return name


@task
def joined(parts: list[str]) -> str:
    """Uses results that were collected long before."""
    mark("joined")
    return ", ".join(parts)


KINDS = {"chatty": chatty, "gated": gated, "hog": hog, "fill": fill}


def wait_for_word(*words: str) -> None:
    while not all((Path(MARKS) / word).exists() for word in words):
        time.sleep(0.05)


@flow(
    name=ORDER["flow"],
    flow_run_name=ORDER["flow_run"],
    retries=ORDER["retries"],
    task_runner=HTCDaskTaskRunner(adapt_kwargs={"minimum": ORDER["minimum"], "maximum": ORDER["maximum"]}),
)
def analysis() -> str:
    """Collects some results, holds some tasks until they are let go, then uses all that it has."""
    tell("began", flow_run_id=str(flow_run.id), attempt=flow_run.run_count)
    values: dict[str, str] = {}
    error = ""
    try:
        early = {name: quick.submit(name) for name in ORDER["quick"]}
        values = {name: future.result() for name, future in early.items()}
        tell("collected", names=sorted(values))
        if ORDER["pause"]:
            wait_for_word("second")
        late = [KINDS[kind].with_options(retries=ORDER["task_retries"]).submit(name) for name, kind in ORDER["late"]]
        results = [future.result() for future in late]
        lost = [name for name, future in early.items() if future.result() != values[name]]
        whole = joined.submit([*early.values(), *results]).result()
        if whole != ", ".join([*values.values(), *results]):
            lost.append("joined")
        tell("lost", names=lost)
        return whole
    except BaseException as exc:
        error = f"{type(exc).__name__}: {exc}"
        raise
    finally:
        tell("ended", error=error)


if ORDER["hooks"]:
    analysis = with_cleanup(analysis)

if __name__ == "__main__":
    analysis()
