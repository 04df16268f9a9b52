"""From HTCondor's words to what a user can do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_htcdask.condor.diagnosis import (
    Category,
    diagnose_eviction,
    diagnose_exit,
    diagnose_hold,
    diagnose_never_joined,
    diagnose_removal,
)


@pytest.mark.parametrize(
    ("code", "category", "remedy"),
    [
        (1, Category.HELD_BY_USER, "condor_release"),
        (6, Category.HELD_EXECUTABLE, "worker.python"),
        (13, Category.HELD_TRANSFER, "condor.spool"),
        (34, Category.HELD_MEMORY, "worker.memory"),
        (35, Category.HELD_CONTAINER, "worker.container_image"),
        (45, Category.HELD_CONTAINER, "worker.container_image"),
        (9999, Category.HELD_OTHER, "condor_q -hold"),
    ],
)
def test_holds(code: int, category: Category, remedy: str) -> None:
    diagnosis = diagnose_hold(code, 2, " Error from slot1: no such file ")
    assert diagnosis.category is category
    assert "Error from slot1: no such file" in diagnosis.summary
    assert f"{code}.2" in diagnosis.summary
    assert remedy in str(diagnosis)
    of_a_group = diagnose_hold(code, 2, "", "workers.gpu")
    assert remedy.replace("worker.", "workers.gpu.") in of_a_group.remedy and "{" not in of_a_group.remedy


@pytest.mark.parametrize(
    ("code", "subcode", "category", "setting"),
    [
        (34, 0, Category.HELD_MEMORY, "workers.gpu.memory"),
        (34, 102, Category.HELD_MEMORY, "workers.gpu.memory"),
        (34, 104, Category.DISK_FULL, "workers.gpu.disk"),
        (21, 102, Category.HELD_MEMORY, "workers.gpu.memory"),
        (21, 104, Category.DISK_FULL, "workers.gpu.disk"),
        (21, 101, Category.HELD_POLICY, "WANT_HOLD"),
    ],
)
def test_the_subcode_tells_which_limit_it_was(code: int, subcode: int, category: Category, setting: str) -> None:
    diagnosis = diagnose_hold(code, subcode, "", "workers.gpu")
    assert diagnosis.category is category and setting in diagnosis.remedy


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


def test_what_it_says_names_the_group_s_own_settings() -> None:
    line = "htcdask: the worker. used 9 MiB; raise worker.memory, or set worker.container_image or worker.python"
    said = "the worker. used 9 MiB; raise workers.gpu.memory, or set workers.gpu.container_image or workers.gpu.python"
    assert diagnose_exit(75, None, [line], settings="workers.gpu").summary == said


@pytest.mark.parametrize(
    ("status", "line", "category", "remedy"),
    [
        (127, "/usr/bin/env: 'python3.9': No such file or directory", Category.PYTHON_MISSING, "workers.gpu.python"),
        (1, "htcdask: the worker on h could not join the scheduler at tls://x: OSError", Category.CANNOT_JOIN, "proxy"),
        (1, "OSError: [Errno 28] No space left on device", Category.DISK_FULL, "workers.gpu.disk"),
        (1, "MemoryError", Category.OUT_OF_MEMORY, "workers.gpu.memory"),
        (1, "ModuleNotFoundError: No module named 'numpy'", Category.PACKAGE_MISSING, "workers.gpu.container_image"),
    ],
)
def test_its_last_words_tell_what_was_missing(status: int, line: str, category: Category, remedy: str) -> None:
    diagnosis = diagnose_exit(status, None, ["noise", line], settings="workers.gpu")
    assert diagnosis.category is category
    assert remedy in diagnosis.remedy and "{" not in diagnosis.remedy
    assert line.removeprefix("htcdask: ") in diagnosis.summary


def test_a_worker_that_died_at_work() -> None:
    assert diagnose_exit(1, None, ["boom"], joined=True).category is Category.DIED
    assert diagnose_exit(127, None, ["boom"], joined=True).category is Category.DIED


def test_what_htcondor_does_with_jobs() -> None:
    evicted = diagnose_eviction("slot1@h", " claim preempted ")
    assert (evicted.category, str(evicted)) == (Category.EVICTED, "evicted from slot1@h: claim preempted")
    assert str(diagnose_eviction(None, "")) == "evicted: no reason given"
    removed = diagnose_removal("via condor_rm (by user ops)")
    assert (removed.category, str(removed)) == (Category.REMOVED, "removed: via condor_rm (by user ops)")


def test_workers_that_never_join() -> None:
    assert diagnose_never_joined(1).summary == "1 worker job runs, but its worker has not joined the scheduler"
    many = diagnose_never_joined(1200)
    assert many.category is Category.NEVER_JOINED and many.summary.startswith("1,200 worker jobs run")
    assert "gateway.proxy_address" in many.remedy


def test_no_category_is_ever_renamed() -> None:
    """Automations of users match on these."""
    assert {category.value for category in Category} == {
        "held_by_user", "held_transfer", "held_executable", "held_policy", "held_memory", "held_container",
        "held_other", "pool_full", "pool_empty", "no_slot_large_enough", "no_slot_matches", "slots_refuse",
        "low_priority", "limit_reached", "waiting", "never_joined", "cannot_join", "died_at_start", "died",
        "out_of_memory", "disk_full", "versions_differ", "package_missing", "python_missing", "evicted", "removed",
    }  # fmt: skip


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
