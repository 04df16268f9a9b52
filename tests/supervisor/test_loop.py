"""The supervisor's rounds: where a part of one fails, the leases are renewed and the other groups served."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest

from prefect_htcdask.condor.job_events import JobChange, JobTable, apply
from prefect_htcdask.condor.schedd import ScheddError
from prefect_htcdask.supervisor.loop import Supervisor
from tests.support.supervisor_rounds import ANSWER, Rounds


@pytest.mark.parametrize("part", ["read", "ask", "cpu", "gpu", "renew"])
@pytest.mark.parametrize("error", [ValueError("of a kind that nobody thought of"), ScheddError("the schedd is away")])
async def test_a_part_that_fails_leaves_the_others_alone(part: str, error: Exception, tmp_path: Path) -> None:
    rounds = Rounds(tmp_path)
    rounds.fails[part] = error
    running = asyncio.ensure_future(rounds.run())
    deadline = time.monotonic() + 20
    while rounds.done.count("renew") < 3:
        assert time.monotonic() < deadline, rounds.done
        await asyncio.sleep(0.01)
    rounds.end("the test is over")
    await running
    one = ["read", "ask", "renew"] if part == "ask" else ["read", "ask", "cpu", "gpu", "renew"]
    assert rounds.done[: 2 * len(one)] == 2 * one
    (told,) = rounds.messages
    assert told["kind"] == "log" and str(error) in told["text"] and "again" in told["text"], "once"


async def test_the_first_tasks_are_looked_for_often_but_not_for_hours(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path)
    rounds.plan = dataclasses.replace(rounds.plan, interval=3.0)
    now = time.monotonic()
    assert [rounds.interval(now + later) for later in (1.0, 30.0, 100.0)] == [0.2, 0.2, 3.0]
    rounds.worker_table.submitted_jobs(["1.0"], "cpu", 1.0)
    assert rounds.interval(now) == 3.0


class Log:
    """A job event log that tells of two jobs that are held, one of them by the user."""

    def __init__(self) -> None:
        self.events = [("1.0", 13), ("1.1", 1)]

    def read(self, table: JobTable) -> list[JobChange]:
        events, self.events = self.events, []
        changes = [apply(table, "JOB_HELD", job, 1.0, {"HoldReasonCode": code}) for job, code in events]
        return [change for change in changes if change]


class Schedd:
    """A schedd that is away the first time."""

    def __init__(self) -> None:
        self.removals: list[list[str]] = []

    def remove(self, jobs: list[str], reason: str) -> None:
        self.removals.append(jobs)
        if len(self.removals) == 1:
            raise ScheddError("the schedd is away")


@pytest.mark.parametrize("taken_over", [False, True])
async def test_held_jobs_go_though_the_schedd_was_away(taken_over: bool, tmp_path: Path) -> None:
    rounds: Any = Rounds(tmp_path)
    rounds.schedd, rounds._reader = Schedd(), Log()
    if taken_over:
        await rounds.take_over(Log())
        assert not rounds.schedd.removals, "the rounds do it"
    with pytest.raises(ScheddError):
        await Supervisor.read_jobs(rounds)
    for _ in range(3):
        await Supervisor.read_jobs(rounds)
    assert rounds.schedd.removals == [["1.0"]] * 2
    assert rounds.worker_table.get("1.0").is_leaving


async def test_a_scheduler_that_nobody_can_ask_any_more_is_given_up(tmp_path: Path) -> None:
    """Its host and the gateway are gone: a supervisor that outlived its parent (a warm pool) would stay for ever."""
    rounds = Rounds(tmp_path)
    rounds.plan = dataclasses.replace(rounds.plan, lease=0.2, scheduler_lease=1.0)
    for number in range(2):
        assert not await rounds.take_answer(None)
        assert not rounds.over.is_set(), f"{number + 1} questions without an answer may be an outage"
    await rounds.take_answer(dict(ANSWER))
    while time.monotonic() - rounds._answered < 1.1:
        await asyncio.sleep(0.1)
        if not rounds.over.is_set() and rounds._unanswered < 2:
            await rounds.take_answer(None)
    assert not rounds.over.is_set(), "one answer is as good as the first"
    await rounds.take_answer(None)
    assert rounds.over.is_set()
    assert [message["kind"] for message in rounds.messages] == ["failed"]


async def test_the_user_is_told_once_of_each_silence_of_the_scheduler(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path)
    rounds.plan = dataclasses.replace(rounds.plan, scheduler_lease=1800.0)

    async def silent_for(seconds: float) -> list[str]:
        rounds.messages.clear()
        rounds._answered = time.monotonic() - seconds
        assert not await rounds.take_answer(None)
        return [message["text"] for message in rounds.messages if message["kind"] == "log"]

    assert await silent_for(5) == []
    (told,) = await silent_for(25)
    assert "for 25 s" in told and "lease.scheduler = 1800 s" in told
    assert await silent_for(50) == []
    await rounds.take_answer(dict(ANSWER))
    assert len(await silent_for(30)) == 1


async def test_what_the_schedd_last_said_is_why_no_worker_came(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path)
    for group in rounds.groups.values():
        group.wanted(1, time.monotonic() - 31.0)
    rounds.groups["cpu"].refused(time.monotonic(), "the schedd takes no more jobs at a time (MAX_JOBS_PER_OWNER)")
    rounds.groups["gpu"].has_joined = True
    await rounds.tick()
    (told,) = [message["text"] for message in rounds.messages if message["kind"] == "failed"]
    assert "start_timeout = 30 s" in told and "MAX_JOBS_PER_OWNER" in told
