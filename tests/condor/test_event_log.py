"""The job event log as it is read: when events happened, and what becomes of a log that is truncated or replaced."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_htcdask.condor.event_times import EventTimes
from prefect_htcdask.condor.job_events import (
    DoubtingReader,
    EventLogReader,
    JobState,
    JobTable,
    QueueReader,
    apply,
)
from prefect_htcdask.condor.schedd import ScheddError

ZONES = ["UTC", "Asia/Tokyo", "America/Chicago", "Asia/Kathmandu", "Europe/Berlin", "Australia/Lord_Howe"]


def as_read(when: float, writer: str, reader: str) -> float:
    """What the bindings make of an event that was written in one zone and is read in another."""
    written = datetime.fromtimestamp(int(when), ZoneInfo(writer)).replace(tzinfo=None)
    return written.replace(tzinfo=ZoneInfo(reader)).timestamp()


# A year with both changes of summer time in either hemisphere.
moments = st.floats(1.76e9, 1.76e9 + 366 * 86400)


@given(moments, st.sampled_from(ZONES), st.sampled_from(ZONES), st.lists(st.floats(0.1, 600), min_size=1, max_size=9))
def test_an_event_is_timed_right_in_any_zone(began: float, writer: str, reader: str, gaps: list[float]) -> None:
    times, now = EventTimes(began), began
    for gap in gaps:
        now += gap
        happened = now - min(gap, 0.9) / 2
        (when,) = times.since([as_read(happened, writer, reader)], now)
        # A log of whole seconds, that is looked at each second or so; a long pause costs no more than that either.
        assert abs(when - happened) <= 1.0 + 1e-3 or (gap > 450 and now - gap <= when <= now)


@given(moments, st.sampled_from(ZONES), st.sampled_from(ZONES), st.lists(st.floats(0, 1e5), min_size=1, max_size=9))
def test_an_old_log_is_in_order_and_not_later_than_it_was_written(
    began: float, writer: str, reader: str, gaps: list[float]
) -> None:
    happened = [began + sum(gaps[:index]) for index in range(len(gaps))]
    written = happened[-1] + 0.2
    when = EventTimes(written + 3e4).before(
        [as_read(each, writer, reader) for each in happened], written, written + 3e4
    )
    assert when == sorted(when) and abs(when[-1] - happened[-1]) <= 1.3
    # Summer time may begin or end in between, in two zones, which the one shift of the end does not know.
    assert all(abs(one - other) <= 2 * 3601 for one, other in zip(when, happened, strict=True))


def test_whatever_the_log_says_an_event_is_not_before_the_last_look_nor_later_than_now() -> None:
    times = EventTimes(1000.0)
    told = times.since([1e9, 5.0, 1002.0, 1001.0], 1003.0)
    assert told == sorted(told) and told[0] >= 1000.0 and told[-1] <= 1003.0
    assert times.since([5.0, 1004.5], 1005.0) == [1003.0, 1004.5]


def event(job: str = "8.0", kind: str = "001", text: str = "Job executing on host: <127.0.0.1:1>") -> str:
    cluster, proc = (int(part) for part in job.split("."))
    now = datetime.now(tz=timezone.utc).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    return f"{kind} ({cluster:03d}.{proc:03d}.000) {now} {text}\n...\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "jobs.log"
    path.write_text("")
    return path


def append(path: Path, text: str) -> None:
    with path.open("a") as stream:
        stream.write(text)


@pytest.fixture(params=ZONES[:3])
def far_away(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is in another zone than the writer of the log, which is in this machine's."""
    yield request.param
    monkeypatch.undo()
    time.tzset()


def test_the_log_of_another_zone(log: Path, far_away: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, table = EventLogReader(log), JobTable()
    reader.read(table)
    table.get("8.0").submitted = time.time()
    append(log, event())
    monkeypatch.setenv("TZ", far_away)
    time.tzset()
    (change,) = reader.read(table)
    record = table.get("8.0")
    assert change.what == "started" and record.started is not None and abs(record.started - time.time()) < 3
    old, later = EventLogReader(log), JobTable()
    os.utime(log)
    old.read(later)
    assert abs((later.get("8.0").started or 0) - time.time()) < 3, "one that takes over reads an old log"
    reader.close()
    old.close()


def states(table: JobTable) -> dict[str, str]:
    return {job_id: record.state.value for job_id, record in sorted(table.records.items())}


def replaced(path: Path) -> None:
    path.rename(path.with_suffix(".1"))
    path.write_text("")


def copied(path: Path) -> None:
    shutil.copy(path, path.with_suffix(".1"))
    path.with_suffix(".1").rename(path)


def truncated(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("fault", [replaced, copied, truncated, Path.unlink])
def test_a_log_that_is_replaced_or_truncated_is_read_on(log: Path, fault: Any) -> None:
    reader, table = EventLogReader(log), JobTable()
    append(log, event("8.0") + event("8.1"))
    held = log.open("a")  # as a shadow does
    assert len(reader.read(table)) == 2
    fault(log)
    if fault is not truncated:
        held.write(event("8.1", "009", "Job was aborted.\n\tvia condor_rm"))
        held.flush()
    assert [change.job_id for change in reader.read(table)] == ([] if fault is truncated else ["8.1"])
    assert reader.replaced == 1
    append(log, event("8.2"))
    assert [change.job_id for change in reader.read(table)] == ["8.2"]
    assert reader.read(table) == [] and reader.replaced == 1
    assert table.get("8.0").starts == 1, "what stands in a copy is not told again"
    reader.close()


def test_a_log_whose_directory_is_gone_is_no_failure(log: Path) -> None:
    reader = EventLogReader(log)
    shutil.rmtree(log.parent)
    for _ in range(2):
        assert reader.read(JobTable()) == []
    assert reader.replaced == 1
    reader.close()


def test_a_damaged_log_is_found_out(log: Path) -> None:
    reader = EventLogReader(log)
    append(log, event("8.0", "005", "Job terminated.\n\t(1) Normal"))
    for _ in range(6):
        assert reader.read(JobTable()) == []
    assert reader.replaced == 1
    reader.close()


def test_an_event_of_which_a_part_is_there_is_read_later(log: Path) -> None:
    reader, table = EventLogReader(log), JobTable()
    whole = event("8.0") + event("8.1", "009", "Job was aborted.\n\tvia condor_rm")
    for end in (len(whole) - 20, len(whole)):
        log.write_text(whole[:end])
        changes = reader.read(table)
    assert [change.what for change in changes] == ["removed"] and table.get("8.0").starts == 1
    assert reader.replaced == 0
    reader.close()


class Queue:
    """A schedd with some jobs, and a history."""

    def __init__(self, **jobs: dict[str, Any]) -> None:
        self.jobs = [{"ClusterId": 8, "ProcId": int(name[1:]), **ad} for name, ad in jobs.items()]
        self.past: list[dict[str, Any]] = []
        self.asked = 0

    def query(self, _constraint: str, _projection: object) -> list[dict[str, Any]]:
        self.asked += 1
        return self.jobs

    def history(self, _constraint: str, _projection: object) -> list[dict[str, Any]]:
        return self.past


STARTED = {"JobStatus": 2, "JobCurrentStartDate": 20, "JobCurrentStartExecutingDate": 21, "RemoteHost": "slot1@a"}


def doubting(log: Path, queue: Queue, **how: float) -> tuple[DoubtingReader, list[str]]:
    complaints: list[str] = []
    reader = DoubtingReader(
        EventLogReader(log),
        QueueReader(queue, "true"),
        complaints.append,
        **{"pause": 0.2, **how},  # type: ignore[arg-type]
    )
    return reader, complaints


def test_a_truncated_log_has_the_queue_fill_the_gap(log: Path) -> None:
    queue = Queue(j0=STARTED, j1={"JobStatus": 1}, j2={"JobStatus": 2, "JobCurrentStartDate": 20}, j3={"JobStatus": 3})
    reader, complaints = doubting(log, queue)
    table = JobTable()
    for proc in range(5):
        apply(table, "SUBMIT", f"8.{proc}", 10.0, {})
    apply(table, "EXECUTE", "8.3", 11.0, {})
    queue.past = [{"ClusterId": 8, "ProcId": 4, "JobStatus": 4, "ExitCode": 3, **{**STARTED, "JobStatus": 4}}]
    append(log, "# " * 50)
    reader.read(table)
    assert queue.asked == 0
    os.truncate(log, 0)
    deadline = time.monotonic() + 30
    while table.get("8.0").state is not JobState.RUNNING:
        reader.read(table)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert states(table) == {"8.0": "running", "8.1": "idle", "8.2": "idle", "8.3": "running", "8.4": "exited"}
    assert (table.get("8.4").starts, table.get("8.4").exit_code) == (1, 3)
    assert complaints[0] == "was truncated, replaced or damaged"
    assert queue.asked == 2, "at once, and once more to be sure"
    reader.read(table)
    assert queue.asked == 2


def test_a_log_that_fell_silent_is_found_out(log: Path) -> None:
    queue = Queue(j0=STARTED)
    reader, complaints = doubting(log, queue, interval=0.3)
    table = JobTable()
    reader.read(table)
    assert queue.asked == 0
    apply(table, "SUBMIT", "8.0", 10.0, {})
    deadline = time.monotonic() + 30
    while table.get("8.0").state is not JobState.RUNNING:
        reader.read(table)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert complaints == ["did not tell what became of 1 job"] and table.get("8.0").starts == 1


def test_a_log_that_is_a_little_late_is_believed(log: Path) -> None:
    queue = Queue(j0=STARTED)
    reader, complaints = doubting(log, queue, interval=0.0)
    table = JobTable()
    apply(table, "SUBMIT", "8.0", 10.0, {})
    reader.read(table)
    append(log, event("8.0"))
    time.sleep(0.3)
    reader.read(table)
    assert queue.asked >= 1 and table.get("8.0").starts == 1 and complaints == []


def test_what_the_log_tells_is_told_though_the_schedd_is_away(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue()

    def away(*_: object) -> list[dict[str, Any]]:
        raise ScheddError("it is away")

    monkeypatch.setattr(queue, "query", away)
    reader, _ = doubting(log, queue, interval=0.0)
    append(log, event("8.0"))
    assert [change.what for change in reader.read(JobTable())] == ["started"]


def test_at_the_end_the_queue_is_believed_at_once(log: Path) -> None:
    reader, complaints = doubting(log, Queue())
    table = JobTable()
    apply(table, "EXECUTE", "8.0", 10.0, {})
    reader.look_at_next_read()
    (change,) = reader.read(table)
    assert change.what == "removed" and complaints == []
