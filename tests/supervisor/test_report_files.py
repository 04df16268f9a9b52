"""What a supervisor accounts for becomes artifacts and files: each part takes what the one before gives."""

from __future__ import annotations

import dataclasses
import subprocess
import time
from pathlib import Path

import pytest

from prefect_htcdask.condor.job_events import apply
from prefect_htcdask.condor.submit_description import FlowRunTag
from prefect_htcdask.runner.ui import artifact_contents as contents
from prefect_htcdask.supervisor.protocol import ReportPlan, SupervisorConfig, from_line, to_line
from prefect_htcdask.supervisor.report.files import write_report
from prefect_htcdask.supervisor.report.markdown import FILES
from prefect_htcdask.supervisor.report.progress import Progress
from tests.support.supervisor_rounds import ANSWER, Rounds

ANSWERS = {
    **ANSWER,
    "groups": {"cpu": {"queued": 4, "done": 3, "spent": 7.5}, "gpu": {"queued": 1, "done": 1, "spent": 0.5}},
    "unfinished": 6,
}


def a_supervisor(directory: Path, report: ReportPlan | None) -> Rounds:
    """One that has seen jobs of two groups run, and tasks end."""
    rounds = Rounds(directory)
    tag = FlowRunTag("0" * 32, "brave-lynx", "Dimuon analysis")
    rounds.plan = dataclasses.replace(rounds.plan, report=report, flow_run=tag)
    now = time.time() - 100
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: now)
        rounds.progress = Progress(rounds.worker_table, rounds.groups, report, rounds.messages.append)
    rounds.worker_table.submitted_jobs(["1.0", "1.1"], "cpu", now)
    rounds.worker_table.submitted_jobs(["2.0"], "gpu", now)
    for event, job, after, data in (
        ("EXECUTE", "1.0", 5.0, {"SlotName": "slot1@a"}),
        ("EXECUTE", "2.0", 9.0, {"SlotName": "slot1@b"}),
        ("IMAGE_SIZE", "1.0", 12.0, {"MemoryUsage": 310}),
        ("JOB_HELD", "2.0", 20.0, {"HoldReasonCode": 34, "HoldReason": "used too much"}),
    ):
        if change := apply(rounds.worker_table.table, event, job, now + after, data):
            rounds.news.take([change])
    for second in range(100):
        rounds.progress.saw(ANSWERS, rounds.worker_table.supplies({**ANSWERS, "joined": []}, 0.0), now + second)
    return rounds


def summary_of(rounds: Rounds) -> dict[str, object]:
    # As it comes to the flow's process.
    return from_line(
        to_line({**rounds.worker_table.summary(time.time()), **rounds.progress.report(rounds.ended_because)})
    )


def test_numbers_report_and_picture_are_left_for_their_owner_alone(tmp_path: Path) -> None:
    rounds = a_supervisor(tmp_path, ReportPlan(5.0, 50, picture=True))
    rounds.end("the cluster was closed")
    summary = summary_of(rounds)
    write_report(rounds.plan, summary)
    text = (tmp_path / "report.md").read_text()
    for words in (
        "# Dimuon analysis / brave-lynx",
        "4 ended of 10 known",
        "cpu: median 5 s",
        "cpu: 310 MiB of 2 GiB",
        "**gpu**: worker jobs were held once",
        "`workers.cpu.memory`",
    ):
        assert words in text, text
    assert (tmp_path / "report.svg").stat().st_size > 2_000
    assert all((tmp_path / name).stat().st_mode & 0o077 == 0 for name in FILES)


def test_nothing_is_left_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are all there when `write_report` returns, and no process goes on that could outlive the supervisor."""
    started: list[object] = []
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **options: started.append(arguments))
    rounds = a_supervisor(tmp_path, ReportPlan(5.0, 50, picture=True))
    rounds.end("the cluster was closed")
    write_report(rounds.plan, summary_of(rounds))
    assert started == [] and all((tmp_path / name).exists() for name in FILES)


def test_the_last_account_is_the_last_state_of_the_artifacts(tmp_path: Path) -> None:
    account = summary_of(a_supervisor(tmp_path, ReportPlan(5.0, 2, picture=False)))["report"]
    assert isinstance(account, dict)
    assert contents.progress(account, over=True)[1:] == (
        40.0,
        "4 of 10 tasks known to the Dask scheduler have ended",
    )
    table = contents.jobs(account)
    assert table is not None and "3 HTCondor jobs: 1 held, 1 idle, 1 running." in table.description
    assert "1 more is not" in table.description and table.data.index("2.0") < table.data.index("1.0")


@pytest.mark.parametrize("plan", [None, ReportPlan(5.0, 50, picture=False)])
def test_what_nobody_wants_is_not_left(plan: ReportPlan | None, tmp_path: Path) -> None:
    rounds = a_supervisor(tmp_path, plan)
    write_report(rounds.plan, summary_of(rounds))
    assert (tmp_path / "report.md").exists() == (plan is not None)
    assert not (tmp_path / "report.svg").exists()
    if plan is not None:
        assert "setting report.picture = False" in (tmp_path / "report.md").read_text()


async def test_numbers_that_make_no_sense_end_no_round(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rounds = a_supervisor(tmp_path, ReportPlan(5.0, 50, picture=False))
    rounds.done.clear()
    rounds.answer = {**ANSWERS, "groups": {"cpu": {"done": "many"}}}
    await rounds.tick()
    assert rounds.done == ["read", "ask", "cpu", "gpu", "renew"] and "is not known any more" in caplog.text
    rounds.worker_table.table.records["1.0"].memory_mib = "much"  # type: ignore[assignment]
    assert rounds.progress.report("it is over") == {} and "there is no report" in caplog.text


def test_a_directory_that_is_gone_is_no_reason_to_fail(tmp_path: Path) -> None:
    rounds = a_supervisor(tmp_path, ReportPlan(5.0, 50, picture=True))
    plan: SupervisorConfig = dataclasses.replace(rounds.plan, run_directory=str(tmp_path / "gone"))
    write_report(plan, summary_of(rounds))
