"""From HTCondor's words to what a user can do."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_htcdask.condor.diagnosis import Category, diagnose_exit, diagnose_hold, diagnose_waiting

MIB = 2**20


@pytest.mark.parametrize(
    ("code", "category", "remedy"),
    [
        (1, Category.HELD_BY_USER, "condor_release"),
        (6, Category.HELD_EXECUTABLE, "worker.python"),
        (13, Category.HELD_TRANSFER, "condor.spool"),
        (34, Category.HELD_MEMORY, "worker.memory"),
        (35, Category.HELD_CONTAINER, "worker.container_image"),
        (9999, Category.HELD_OTHER, "condor_q -hold"),
    ],
)
def test_holds(code: int, category: Category, remedy: str) -> None:
    diagnosis = diagnose_hold(code, 2, " Error from slot1: no such file ")
    assert diagnosis.category is category
    assert "Error from slot1: no such file" in diagnosis.summary
    assert f"{code}.2" in diagnosis.summary
    assert remedy in str(diagnosis)


@given(st.integers(), st.integers(), st.text())
def test_every_hold_has_words(code: int, subcode: int, reason: str) -> None:
    diagnosis = diagnose_hold(code, subcode, reason)
    assert diagnosis.summary and diagnosis.remedy


@pytest.mark.parametrize(
    ("status", "category"),
    [(75, Category.OUT_OF_MEMORY), (64, Category.VERSIONS_DIFFER), (69, Category.PACKAGE_MISSING)],
)
def test_what_our_own_start_script_says_is_said_again(status: int, category: Category) -> None:
    diagnosis = diagnose_exit(status, None, ["noise", "htcdask: dask 1 there, 2 here", "more noise"])
    assert (diagnosis.category, str(diagnosis)) == (category, "dask 1 there, 2 here")


def test_a_traceback_s_last_lines_are_told() -> None:
    lines = [
        "Traceback (most recent call last):",
        '  File "x.py", line 1',
        "    1/0",
        "    ~^~",
        "ZeroDivisionError: no",
    ]
    diagnosis = diagnose_exit(1, None, lines)
    assert diagnosis.category is Category.DIED_AT_START
    assert "exit status 1" in diagnosis.summary and diagnosis.summary.endswith("ZeroDivisionError: no")
    assert "~^~" not in diagnosis.summary


def test_a_silent_worker() -> None:
    assert "signal 9: it left no word on stderr" in diagnose_exit(None, 9, []).summary


def slot(**changes: Any) -> dict[str, Any]:
    return {
        "SlotType": "Partitionable",
        "State": "Unclaimed",
        "Cpus": 4,
        "Memory": 8000,
        "TotalSlotCpus": 4,
        "TotalSlotMemory": 8000,
        **changes,
    }


@pytest.mark.parametrize(
    ("slots", "ask", "category", "words"),
    [
        ([], {}, Category.POOL_EMPTY, "3 worker jobs wait: the pool has no slot"),
        ([slot(), slot()], {"cpus": 8}, Category.NO_SLOT_LARGE_ENOUGH, "0 of 2 slots have 8 cpus, 1024 MiB"),
        ([slot()], {"memory": 9000 * MIB}, Category.NO_SLOT_LARGE_ENOUGH, "worker.memory"),
        ([slot()], {"gpus": 1}, Category.NO_SLOT_LARGE_ENOUGH, "1 GPUs"),
        ([slot(Cpus=0), slot(SlotType="Dynamic", State="Claimed")], {}, Category.POOL_FULL, "1 slots claimed"),
        ([slot(SlotType="Static", State="Claimed")], {}, Category.POOL_FULL, "worker.start_timeout"),
        ([slot()], {}, Category.WAITING, "condor_q -better-analyze"),
        ([slot()], {"waiting": 1}, Category.WAITING, "1 worker job waits"),
    ],
)
def test_why_jobs_wait(slots: list[dict[str, Any]], ask: dict[str, int], category: Category, words: str) -> None:
    diagnosis = diagnose_waiting(slots, **{"cpus": 1, "memory": 1024 * MIB, "gpus": 0, "waiting": 3, **ask})
    assert diagnosis.category is category
    assert words in str(diagnosis)
