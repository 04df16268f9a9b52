"""What becomes of a submission that the schedd does not take, or not whole."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from prefect_htcdask.condor import schedd as schedd_module
from prefect_htcdask.condor.address import ScheddAddress
from prefect_htcdask.condor.schedd import (
    ScheddClient,
    ScheddError,
    ScheddLimit,
    ScheddRefusal,
    check_description,
    judge_submission,
)
from prefect_htcdask.condor.submit_description import WorkerSpec
from prefect_htcdask.supervisor import notifier as voice_module
from prefect_htcdask.supervisor.actions import Actions
from prefect_htcdask.supervisor.notifier import Notifier
from prefect_htcdask.supervisor.policy import Target
from prefect_htcdask.supervisor.protocol import GroupPlan
from prefect_htcdask.supervisor.worker_group import WorkerGroup
from prefect_htcdask.supervisor.worker_table import WorkerTable
from tests.support.cluster_fixtures import texts

# As release 25.14 of the bindings and 23.9 of the schedd say it: measured.
REFUSALS = {
    "Failed to create job ad, errmsg=Submit:-1:Parse error in expression: \n\tProjectName = cms physics\n\t": (
        "Parse error in expression: ProjectName = cms physics"
    ),
    "Failed to create job ad, errmsg=Submit:-1:unable to read proxy file\n": "unable to read proxy file",
    "Failed to create job ad, errmsg=Submit:-1:Invalid accounting_group: a b c\n": "Invalid accounting_group: a b c",
    "Unable to commit transaction, SCHEDD:2:say which project: +ProjectName": "say which project: +ProjectName",
    "Unable to commit transaction, SCHEDD:2:Submit requirement P not met.\n": "Submit requirement P not met.",
    "Failed to create new cluster.SCHEDD:13:User x@y is disabled : ask Anne": "User x@y is disabled : ask Anne",
    "expected next ProcId to be 0, but Schedd says -4": "MAX_JOBS_PER_SUBMISSION",
    "expected next ProcId to be 0, but Schedd says -5": "disabled",
}
LIMITS = {
    "expected next ProcId to be 3, but Schedd says -2": (3, False, "MAX_JOBS_SUBMITTED"),
    "expected next ProcId to be 0, but Schedd says -3": (0, False, "MAX_JOBS_PER_OWNER"),
    "expected next ProcId to be 7, but Schedd says -4": (7, True, "MAX_JOBS_PER_SUBMISSION"),
    "Failed to create new cluster.SCHEDD:22:MAX_JOBS_SUBMITTED exceeded. Current=4, Limit=3": (
        0, False, "MAX_JOBS_SUBMITTED exceeded. Current=4, Limit=3"
    ),
}  # fmt: skip
PASSES = [
    "Failed to connect to schedd, errmsg=CEDAR:6001:Failed to connect to <127.0.0.1:1>",
    "Unable to locate local daemon",
    "Unable to commit transaction, ",
    "Unable to commit transaction, SCHEDD:110:",
    "Failed to create new cluster.",
    "expected next ProcId to be 5, but Schedd says -1",
    "expected next ProcId to be 5, but Schedd says -10",
    "Failed to set Args=x for job 1.0 (110)\n",
    "",
]


@pytest.mark.parametrize("said", REFUSALS)
def test_a_refusal_is_one(said: str) -> None:
    judged = judge_submission(said)
    assert isinstance(judged, ScheddRefusal) and REFUSALS[said] in str(judged) and "\n" not in str(judged)


@pytest.mark.parametrize("said", LIMITS)
def test_a_limit_is_one(said: str) -> None:
    judged = judge_submission(said)
    assert isinstance(judged, ScheddLimit)
    assert (judged.fits, judged.in_one_submission) == LIMITS[said][:2] and LIMITS[said][2] in str(judged)


@pytest.mark.parametrize("said", PASSES)
def test_what_may_pass_by_itself_is_no_refusal(said: str) -> None:
    assert judge_submission(said) is None


class Queue(ScheddClient):
    """A schedd with limits, without a pool; it counts submissions as HTCondor does."""

    def __init__(self, per_submission: int = 10**6, per_owner: int = 10**6, said: str = "") -> None:
        super().__init__(ScheddAddress())
        self.per_submission, self.per_owner, self.said = per_submission, per_owner, said
        self.taken: list[int] = []

    def _call(self, what: str, function: str, *args: Any, **kwargs: Any) -> Any:
        count = args[1]
        if self.said:
            raise ScheddError(f"{what}: {self.said}") from RuntimeError(self.said)
        for limit, code in ((self.per_owner - sum(self.taken), -3), (self.per_submission, -4)):
            if count > limit:
                said = f"expected next ProcId to be {limit}, but Schedd says {code}"
                raise ScheddError(f"{what}: {said}") from RuntimeError(said)
        self.taken.append(count)
        return Result(len(self.taken), count)

    def now(self) -> float:
        return 1_800_000_000.0


class Result:
    def __init__(self, cluster: int, count: int) -> None:
        self.cluster, self.first_proc, self.num_procs = (lambda: cluster), (lambda: 0), (lambda: count)


JOB = {"executable": "/bin/true"}


def test_a_limit_on_one_submission_makes_several() -> None:
    queue = Queue(per_submission=3)
    assert len(set(queue.submit(JOB, 10))) == 10
    assert queue.taken == [3, 3, 3, 1] and queue.limit == ""
    queue.submit(JOB, 4)
    assert queue.taken[4:] == [3, 1], "it is known by now"


def test_as_many_are_submitted_as_there_is_room_for() -> None:
    queue = Queue(per_submission=3, per_owner=5)
    assert len(queue.submit(JOB, 10)) == 5
    assert "MAX_JOBS_PER_OWNER" in queue.limit
    with pytest.raises(ScheddLimit, match="MAX_JOBS_PER_OWNER"):
        queue.submit(JOB, 10)
    queue.per_owner = 100
    assert len(queue.submit(JOB, 2)) == 2 and queue.limit == ""


@pytest.mark.parametrize(
    ("commands", "words"),
    [
        (
            {"x509userproxy": "/no/such/proxy"},
            ["worker.extra_submit['x509userproxy'] = '/no/such/proxy'", "voms-proxy"],
        ),
        ({"X509UserProxy": "proxy.pem"}, ["full path"]),
        ({"use_x509userproxy": "true"}, ["use_x509userproxy", "/no/such/x509"]),
    ],
)
def test_a_proxy_that_is_not_there(
    commands: Mapping[str, str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("X509_USER_PROXY", "/no/such/x509")
    with pytest.raises(ScheddError) as caught:
        check_description({**JOB, **commands})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_proxy_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "proxy").write_text("a proxy")
    check_description({**JOB, "x509userproxy": str(tmp_path / "proxy")})
    check_description({**JOB, "x509userproxy": "$ENV(NO_SUCH)/proxy"})


class Rounds:
    """The actions of one group, whose schedd may take jobs or not."""

    def __init__(self, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
        self.messages: list[dict[str, Any]] = []
        spec = WorkerSpec(extra_submit={"+ProjectName": '"cms"'})
        self.group = WorkerGroup("default", GroupPlan(spec, 30.0, Target(fixed=4)), "workers", Target(fixed=4))
        self.group.files = object()  # type: ignore[assignment]
        self.notifier = Notifier(self.messages.append, lambda record: "", several=False)
        self.worker_table = WorkerTable(("default",))
        monkeypatch.setattr("prefect_htcdask.supervisor.actions.submit_description", lambda *args, **named: JOB)

        async def condor(function: Any, *args: Any) -> Any:
            return function(*args)

        plan: Any = type("Plan", (), {"access": type("A", (), {"cluster_name": "c"}), "flow_run": None})
        plan.lease = plan.lost_schedd = 30.0
        self.actions = Actions(plan, queue, condor, self.worker_table, Any, self.notifier)  # type: ignore[arg-type]

    def submit(self, count: int) -> int:
        return asyncio.run(self.actions.submit(self.group, count))


REFUSAL = "Unable to commit transaction, SCHEDD:2:ProjectName cms is closed"


def test_a_refusal_ends_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = Rounds(Queue(said=REFUSAL), monkeypatch)
    assert rounds.submit(4) == 0
    text = texts(rounds.messages, "failed")
    assert "ProjectName cms is closed" in text and "worker.extra_submit['+ProjectName'] = '\"cms\"'" in text
    assert rounds.group.gave_up and "reached" not in text


def test_a_refusal_leaves_workers_alone_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue()
    rounds = Rounds(queue, monkeypatch)
    assert rounds.submit(1) == 1
    queue.said = REFUSAL
    assert rounds.submit(3) == 0
    assert texts(rounds.messages, "failed") == "" and "is closed" in texts(rounds.messages, "log")
    assert not rounds.group.gave_up and rounds.group.submit_after > 0


def test_a_limit_waits_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(per_owner=3)
    rounds = Rounds(queue, monkeypatch)
    assert rounds.submit(5) == 3
    assert "took 3 of 5 worker jobs" in texts(rounds.messages, "log"), rounds.messages
    assert rounds.submit(2) == 0
    assert "MAX_JOBS_PER_OWNER" in rounds.group.not_taken and texts(rounds.messages, "failed") == ""
    queue.per_owner = 5
    assert rounds.submit(2) == 2 and rounds.group.not_taken == ""


def test_what_lasts_is_said_again_at_growing_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(voice_module.time, "monotonic", lambda: now)
    messages: list[dict[str, Any]] = []
    notifier = Notifier(messages.append, lambda record: "", several=False)
    told = []
    for second in range(7300):
        now = 100.0 + second
        before = len(messages)
        notifier.tell_again("error", "x", key=f"away since {second}")
        if len(messages) > before:
            told.append(second)
    assert told == [0, 60, 180, 420, 900, 1860, 3780]


def test_the_schedd_s_own_words_are_not_taken_for_its_absence() -> None:
    client = ScheddClient(ScheddAddress())
    for said, away in (
        ("expected next ProcId to be 5, but Schedd says -10", False),
        ("CEDAR:6001:Failed to connect to <127.0.0.1:1>", True),
    ):
        assert ("cannot be reached" in client._unreachable("here", RuntimeError(said))) is away
    assert schedd_module.judge_submission("anything else") is None
