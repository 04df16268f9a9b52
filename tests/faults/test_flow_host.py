"""The host of the flow is not as one thinks: another time zone, a full disk, an event log that somebody tidies away."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.arena import Arena
from tests.faults.flow_process import FlowProcess
from tests.faults.jobs import finish
from tests.faults.row import Row
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.pool, pytest.mark.faults]

NewFlow = Callable[..., FlowProcess]


def account(arena: Arena) -> dict[str, Any]:
    """What the supervisor's report says of the only worker group."""
    numbers = wait_until(lambda: list(arena.runs.glob("*/summary.json")), 60, "the report's numbers")
    group: dict[str, Any] = json.loads(numbers[0].read_text())["report"]["groups"]["default"]
    return group


@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/Chicago"])
def test_time_zone(zone: str, arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """the flow's shell is in another time zone than the pool's daemons"""
    began = time.monotonic()
    late = [[f"g{number}", "gated"] for number in range(4)]
    flow = new_flow({"TZ": zone}, maximum=4, late=late).start().compute()
    finish(arena, row, flow, again=0)
    took, group = time.monotonic() - began, account(arena)
    row.note = (
        f"{group['jobs']} jobs waited {group['wait_median']:.1f} s, and took {group['boot_median']:.1f} s to join"
    )
    row.expect(0 <= group["wait_p95"] < took and 0 < group["boot_median"] < took, "times are impossible: " + row.note)
    row.expect(0 < group["worker_seconds"] < 4 * took, f"{group['worker_seconds']} worker seconds in {took} s")
    row.check()


@pytest.mark.parametrize("fault", ["truncated", "moved away", "deleted"])
def test_event_log(fault: str, arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """the job event log is not what it was, and then a job is evicted and another removed"""
    flow = new_flow().start().compute()
    (log,) = arena.runs.glob("*/jobs.log")
    if fault == "truncated":
        os.truncate(log, 0)
    elif fault == "moved away":
        log.rename(log.with_suffix(".old"))
    else:
        log.unlink()
    wait_until(lambda: "jobs.log was" in flow.log.read_text(), 60, "somebody tells")
    arena.condor("condor_vacate_job", flow.job_of("g0"))
    arena.condor("condor_rm", flow.job_of("g1"))
    for task in ("g0", "g1"):
        flow.runs(task, 2)
    finish(arena, row, flow, again=2)
    group = account(arena)
    row.note = f"{group['jobs']} jobs, {group['started']} started, {group['evictions']} evicted"
    row.expect(group["jobs"] == group["started"] and group["evictions"] >= 1, f"it is blind: {row.note}")
    row.check()


@pytest.fixture
def small_disk(arena: Arena) -> Iterator[Path]:
    """The disk of the run directories is one of 24 MiB."""
    arena.runs.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m,mode=700", "tmpfs", arena.runs], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield arena.runs
    subprocess.run(["umount", "--lazy", arena.runs], check=True)


def free(disk: Path) -> int:
    status = os.statvfs(disk)
    return status.f_bavail * status.f_frsize


def fill(disk: Path, name: str, leave: int) -> None:
    """Have so many bytes left on a disk."""
    with (disk / name).open("wb") as stream:
        stream.write(bytes(max(0, free(disk) - leave)))


def test_disk_full(arena: Arena, small_disk: Path, row: Row, new_flow: NewFlow) -> None:
    """the disk that takes the workers' stderr fills up while their tasks go on writing to it"""
    flow = new_flow(late=[["c0", "chatty"], ["c1", "chatty"]]).start().compute()
    fill(small_disk, "others", leave=800_000)
    wait_until(lambda: "are free on the disk of" in flow.log.read_text(), 60, "somebody tells")

    def all_is_quiet() -> bool:
        before = {path: path.stat().st_size for path in small_disk.glob("*/logs/*.err")}
        time.sleep(1.0)
        return before == {path: path.stat().st_size for path in before}

    wait_until(all_is_quiet, 60, "the workers write no more", pause=0.5)
    fill(small_disk, "the-rest", leave=0)
    row.expect(free(small_disk) < 4096, "it is not full")
    time.sleep(5)  # in which they would have been evicted
    row.expect([len(flow.runs_of(task)) for task in ("c0", "c1")] == [1, 1], "workers were evicted")
    for name in ("others", "the-rest"):
        (small_disk / name).unlink()
    wait_until(lambda: "there is room again" in flow.log.read_text(), 60, "all is well again")
    finish(arena, row, flow, again=0)
