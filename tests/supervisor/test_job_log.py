"""What the supervisor tells of jobs: messages and lines in the log, from job events."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from prefect_htcdask.condor.job_events import apply
from prefect_htcdask.condor.staging import RunDirectory
from prefect_htcdask.condor.submit_description import WorkerSpec
from prefect_htcdask.supervisor.job_log import JobEventHandler, unmatched
from prefect_htcdask.supervisor.policy import Target
from prefect_htcdask.supervisor.protocol import GroupPlan, to_line
from prefect_htcdask.supervisor.report.events import JobEvents
from prefect_htcdask.supervisor.worker_group import WorkerGroup
from prefect_htcdask.supervisor.worker_table import WorkerTable
from prefect_htcdask.worker.start import START_LINE


def a_group(name: str = "default") -> WorkerGroup:
    wanted = Target(fixed=2)
    return WorkerGroup(name, GroupPlan(WorkerSpec(cpus=2), start_timeout=30.0, target=wanted), "workers", wanted)


class Told:
    """News of a fleet of two groups."""

    def __init__(self, directory: Path) -> None:
        self.messages: list[dict[str, Any]] = []
        self.groups = {"cpu": a_group("cpu"), "gpu": a_group("gpu")}
        self.worker_table = WorkerTable(("cpu", "gpu"))
        self.worker_table.submitted_jobs(["1.0", "1.1", "1.2"], "cpu", 10.0)
        self.worker_table.submitted_jobs(["2.0"], "gpu", 10.0)
        self.news = JobEventHandler(self.worker_table, self.groups, RunDirectory(directory), self.messages.append)

    def __call__(self, event: str, *jobs: str, when: float = 20.0, **data: Any) -> list[str]:
        changes = [apply(self.worker_table.table, event, job, when, data) for job in jobs]
        return self.news.take([change for change in changes if change])

    def of(self, job_id: str) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["kind"] == "job" and message["job_id"] == job_id]

    @property
    def log(self) -> list[str]:
        return [message["text"] for message in self.messages if message["kind"] == "log"]


def test_jobs_teach_their_own_group(tmp_path: Path) -> None:
    told = Told(tmp_path)
    told("EXECUTE", "1.0", "2.0", SlotName="slot1@a")
    assert (list(told.groups["cpu"].waits), list(told.groups["gpu"].waits)) == ([10.0], [10.0])
    told("JOB_TERMINATED", "2.0", ReturnValue=3)
    assert (told.groups["cpu"].failures, told.groups["gpu"].failures) == (0, 1)
    assert told.groups["gpu"].last_failed is told.worker_table.table.get("2.0")
    assert told.log == [
        f"HTCondor job 2.0 ended on slot1@a: {told.news.why_it_ended(told.worker_table.table.get('2.0'))}"
    ]


def test_jobs_that_share_a_fate_share_a_line(tmp_path: Path) -> None:
    told = Told(tmp_path)
    assert told("JOB_HELD", "1.0", "1.1", HoldReasonCode=13, HoldReason="no such file") == ["1.0", "1.1"]
    assert len(told.log) == 1 and told.log[0].startswith("HTCondor jobs 1.0, 1.1 held:")
    assert told("JOB_HELD", "1.2", HoldReasonCode=1, HoldReason="by the user") == [], "that is the user's to release"


def test_tasks_that_no_group_can_run() -> None:
    gpu = a_group("gpu")
    gpu.plan = dataclasses.replace(gpu.plan, spec=WorkerSpec(resources={"GPU": 1}))
    text = unmatched("GPU=2", 3, [a_group("cpu"), gpu])
    assert text.startswith(
        "3 waiting tasks asked for GPU=2, which no worker group offers (cpu: -; gpu: GPU=1): ask for"
    )
    text = unmatched("worker=tls://10.0.0.1:42", 1, [gpu])
    assert text.startswith("1 waiting task may run on the worker at tls://10.0.0.1:42 only, which is not there: submit")


def test_a_message_carries_all_that_is_known_of_the_job(tmp_path: Path) -> None:
    told = Told(tmp_path)
    told("EXECUTE", "2.0", when=20.0, SlotName="slot1@a")
    told("IMAGE_SIZE", "2.0", when=25.0, MemoryUsage=300)
    told("IMAGE_SIZE", "2.0", when=26.0, MemoryUsage=200)
    told("JOB_HELD", "2.0", when=30.0, HoldReasonCode=34, HoldReasonSubCode=1, HoldReason="too much memory")
    started, memory, held = told.of("2.0")
    assert (started["what"], started["state"], started["started"], started["peak_memory"]) == (
        ("started", "running", 20.0, None)
    )
    assert (memory["what"], memory["peak_memory"]) == ("memory", 300 * 2**20)
    assert held == {
        "kind": "job",
        "what": "held",
        "job_id": "2.0",
        "group": "gpu",
        "state": "held",
        "host": "slot1@a",
        "submitted": 10.0,
        "started": 20.0,
        "ended": None,
        "run_seconds": 10.0,
        "starts": 1,
        "evictions": 0,
        "peak_memory": 300 * 2**20,
        "requested_memory": WorkerSpec().memory,
        "requested_cpus": 2,
        "exit_code": None,
        "exit_signal": None,
        "hold_reason": "too much memory",
        "category": "held_memory",
        "summary": "held by HTCondor: too much memory (code 34.1)",
        "remedy": held["remedy"],
        "reason": f"held by HTCondor: too much memory (code 34.1) ({held['remedy']})",
        "asked_for": False,
    }
    assert "workers.gpu.memory" in held["remedy"]
    assert to_line(held)


def test_of_a_job_s_stderr_the_last_start_s_lines_tell_why_it_ended(tmp_path: Path) -> None:
    """HTCondor goes on in the same file where a job starts again."""
    told = Told(tmp_path)
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "worker.1.0.err"
    log.write_text("htcdask: the worker was told to leave\n")
    told("EXECUTE", "1.0", SlotName="slot1@a")
    told("JOB_EVICTED", "1.0", Reason="vacated")
    told("EXECUTE", "1.0", SlotName="slot1@b")
    with log.open("a") as stream:
        stream.write(START_LINE.format(number=2, job="1.0", host="b.example.org") + "\nthe detector is on fire\n")
    told("JOB_TERMINATED", "1.0", ReturnValue=3)
    assert told.of("1.0")[-1]["summary"] == "worker ended with exit status 3: the detector is on fire"
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["worker.1.0.err"], "nothing is copied"


def test_an_eviction_for_a_full_disk_of_this_host_is_an_error(tmp_path: Path) -> None:
    told = Told(tmp_path)
    reason = "StreamHandler: stderr: couldn't write to logs/worker.1.0.err: No space left on device (-1!=12)"
    for text in (reason, "vacated"):
        told("EXECUTE", "1.0", SlotName="slot1@a")
        told("JOB_EVICTED", "1.0", Reason=text)
    full, vacated = [one for one in told.messages if one["kind"] == "log"]
    assert full["level"] == "error" and "free space on this host's disk" in full["text"]
    assert vacated["level"] == "info" and "free space" not in vacated["text"]


def test_changes_of_one_look_have_each_their_own_reason(tmp_path: Path) -> None:
    told = Told(tmp_path)
    table = told.worker_table.table
    apply(table, "EXECUTE", "1.0", 20.0, {"SlotName": "slot1@a"})
    changes = [
        apply(table, "JOB_EVICTED", "1.0", 30.0, {"Reason": "vacated"}),
        apply(table, "JOB_ABORTED", "1.0", 31.0, {"Reason": "removed by ops"}),
    ]
    told.news.take([change for change in changes if change])
    evicted, removed = told.of("1.0")
    assert (evicted["category"], evicted["reason"]) == ("evicted", "evicted from slot1@a: vacated")
    assert (removed["category"], removed["reason"]) == ("removed", "removed: removed by ops")
    assert (removed["ended"], removed["run_seconds"], removed["evictions"]) == (31.0, 10.0, 1)


def test_a_removal_that_we_asked_for_is_no_fault(tmp_path: Path) -> None:
    """HTCondor tells of it as of an eviction first."""
    told, events = Told(tmp_path), JobEvents("c1")
    told("EXECUTE", "1.0", "1.1", SlotName="slot1@a")
    told.worker_table.mark_leaving(["1.0"])
    for job in ("1.0", "1.1"):
        told("JOB_EVICTED", job, when=30.0, Reason="removed")
        told("JOB_ABORTED", job, when=30.0, Reason="prefect_htcdask: the cluster was closed")
    ours, others = ([one for one in told.of(job) if one["what"] != "started"] for job in ("1.0", "1.1"))
    assert [(one["what"], one["category"], one["asked_for"]) for one in ours] == [
        ("evicted", None, True),
        ("removed", None, True),
    ]
    assert "the cluster was closed" in ours[-1]["reason"], "a task run that was lost with it tells so"
    for message in (*ours, *others):
        events.take(message)
    counts = {(e.name, e.resource.get("htcdask.category")): e.payload["count"] for e in events.due(0.0, last=True)}
    assert counts == {
        ("htcdask.job.evicted", "evicted"): 1,
        ("htcdask.job.removed", None): 1,
        ("htcdask.job.removed", "removed"): 1,
    }


def test_a_worker_that_joined_and_died_did_not_die_at_its_start(tmp_path: Path) -> None:
    told = Told(tmp_path)
    told("EXECUTE", "1.0", "1.1", SlotName="slot1@a")
    told.worker_table.saw_workers(["htcdask-1.0-1"])
    told.news.joined(told.worker_table.table.get("1.0"))
    assert told.of("1.0")[-1]["what"] == "joined" and told.of("1.0")[-1]["category"] is None
    told("JOB_TERMINATED", "1.0", "1.1", ReturnValue=3)
    assert [told.of(job)[-1]["category"] for job in ("1.0", "1.1")] == ["died", "died_at_start"]
    told("EXECUTE", "1.2")
    told("JOB_TERMINATED", "1.2", ReturnValue=0)
    assert told.of("1.2")[-1]["category"] == "died_at_start", "it ended well, but never joined"


def test_of_a_large_stderr_only_the_end_is_read(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.logs.mkdir(parents=True, exist_ok=True)
    log = directory.logs / "worker.7.0.err"
    assert directory.stderr_tail("7.0") == []
    log.write_text("one\n\ntwo\n")
    assert directory.stderr_tail("7.0") == ["one", "two"]
    with log.open("ab") as stream:
        stream.truncate(50_000_000)
        stream.seek(0, 2)
        stream.write(b"the rest of a line\nthe last but one\n\xff is no text\n")
    assert directory.stderr_tail("7.0", 2) == ["the last but one", "\ufffd is no text"]
