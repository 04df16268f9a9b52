"""The disk that takes the workers' logs: told once, and the workers are quiet while it is full."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefect_htcdask.supervisor import disk_watch
from prefect_htcdask.supervisor.disk_watch import INTERVAL, DiskWatch, free_bytes

MIB = 2**20


async def test_a_full_disk_is_told_once_and_workers_are_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, Any]] = []
    quiet: list[bool] = []
    free = 500 * MIB

    async def condor(function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    monkeypatch.setattr(disk_watch, "free_bytes", lambda _: (free, 100 * MIB))
    watch = DiskWatch(tmp_path, condor, quiet.append, said.append)
    for number, megabytes in enumerate((500, 90, 10, 150, 300, 300, 300, 300, 20)):
        free = megabytes * MIB
        await watch.look(number * INTERVAL)
        await watch.look(number * INTERVAL + 1)
    assert quiet == [True, True, True, False, False, False, True]
    assert [one["level"] for one in said] == ["error", "info", "error"]
    assert all(word in said[0]["text"] for word in ("90.00 MiB", str(tmp_path), "condor.directory", "Free some space"))


async def test_a_directory_that_is_gone_is_no_failure(tmp_path: Path) -> None:
    async def condor(function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    said: list[dict[str, Any]] = []
    await DiskWatch(tmp_path / "gone", condor, lambda _: None, said.append).look(0.0)
    assert said == []


def test_what_is_too_little_is_less_on_a_small_disk(tmp_path: Path) -> None:
    free, few = free_bytes(tmp_path)
    assert free > 0 and MIB <= few <= 100 * MIB
