"""A worker job's description: whatever stands in names and settings, it stays what it is, and injects nothing."""

from __future__ import annotations

import re
import time
import unicodedata
from typing import Any

import classad2
import htcondor2
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from prefect_htcdask.condor.schedd import ScheddClient
from prefect_htcdask.condor.submit_description import (
    LEASE_REASON,
    RUNNING_GRACE,
    FlowRunTag,
    JobFiles,
    WorkerJobError,
    WorkerSpec,
    bare_words,
    checked_extra_submit,
    cluster_constraint,
    cluster_digest,
    flow_run_constraint,
    quote_arguments,
    quote_environment,
    settings_in,
)
from prefect_htcdask.worker.names import job_of_worker, worker_name
from tests.support.submit_descriptions import describe
from tests.support.waiting import wait_until

# What HTCondor, ClassAds or a submit file might take for more than text.
FRAGMENTS = [
    '"', "'", "\\", '\\"', "\n", "\r\n", "\t", " ", "$", "$$", "$(HOME)", "$(DOLLAR)", "$$(Name)", "$$([1+1])",
    "$ENV(HOME)", "$RANDOM_INTEGER(1,9)", "&&", "||", " = ", ";", "[", "]", "{", "}", "queue 5", "+Evil = 1", "%", "#",
    "@=end", "é", "漢", "👩\u200d🔬", "\u00a0", "\u2028", "\x00", "\x01", "\x7f", "\x85", "a", "Z", "0", "-", "true",
]  # fmt: skip
names = st.one_of(st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join), st.text(max_size=30))


def expected(name: str) -> str:
    """How a name reads in a job ad: control characters go, and so does what HTCondor would expand at match time."""
    plain = "".join(" " if c in "\n\r\t" else "?" if unicodedata.category(c) in ("Cc", "Cs") else c for c in name)
    return re.sub(r"(?i)\$\$+(?=\w*\()|\$(?=\(dollar\))", lambda match: "$ " * len(match.group()), plain)


@pytest.mark.pool
def test_names_come_back_from_real_job_ads(queue: ScheddClient) -> None:
    @hypothesis_settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(names, min_size=15, max_size=25))
    def check(drawn: list[str]) -> None:
        clusters = {}
        for name in drawn:
            commands = describe(
                flow_run=FlowRunTag("0-1", name, name, 2), group=name, lease_expires=int(time.time()) + 600
            )
            del commands["log"]
            (job,) = queue.submit({**commands, "initialdir": "/tmp", "hold": "true"}, 1)
            clusters[job.split(".")[0]] = name
        try:
            ads = queue.query(f"ClusterId >= {min(clusters, key=int)}")
            assert {str(ad["ClusterId"]) for ad in ads} == set(clusters), "each submission made one job"
            for ad in ads:
                name = clusters[str(ad["ClusterId"])]
                wanted = expected(name)
                assert (ad["PrefectFlowName"], ad["JobBatchName"], ad["HTCDaskWorkerGroup"]) == (wanted,) * 3
                assert ad["HTCDaskClusterName"] == cluster_digest("c0ffee")
                assert "Evil" not in ad
                assert "$$(" not in ad["PrefectFlowName"]
        finally:
            queue.remove(f"ClusterId >= {min(clusters, key=int)}", "test")

    check()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("a \"quoted\" 'name'", "a \"quoted\" 'name'"),
        ("back\\slash\\", "back\\slash\\"),
        ("$(HOME) and $ENV(HOME)", "$(HOME) and $ENV(HOME)"),
        ("two\nlines", "two lines"),
        ("$$(Name)", "$ $ (Name)"),
    ],
)
@pytest.mark.pool
def test_some_names_in_an_ad(queue: ScheddClient, name: str, wanted: str) -> None:
    commands = describe(flow_run=FlowRunTag("0-1", name, name, 1), lease_expires=int(time.time()) + 600)
    del commands["log"]
    (job,) = queue.submit({**commands, "initialdir": "/tmp", "hold": "true"}, 1)
    (ad,) = queue.query(f"ClusterId == {job.split('.')[0]}")
    queue.remove([job], "test")
    assert (ad["PrefectFlowName"], ad["JobBatchName"]) == (wanted, wanted)


# Words of the new syntax, split again as HTCondor's manual says: spaces part, single quotes hold together, and a double
# quote is written twice.
def split_new_syntax(text: str) -> list[str]:
    assert text[0] == text[-1] == '"'
    text = text[1:-1].replace('""', '"').replace("$(DOLLAR)", "$")
    words, word, quoted, started, position = [], "", False, False, 0
    while position < len(text):
        c = text[position]
        if c == "'" and quoted and text[position + 1 : position + 2] == "'":
            word, position = word + "'", position + 1
        elif c == "'":
            quoted, started = not quoted, True
        elif c == " " and not quoted:
            words, word, started = words + ([word] if started else []), "", False
        else:
            word, started = word + c, True
        position += 1
    return words + ([word] if started else [])


values = st.text(st.characters(exclude_characters="\n\r\0", exclude_categories=["Cs"]), max_size=30).filter(
    lambda text: not re.search(r"(?i)\$\$+\w*\(|\$\(dollar\)", text)
)


@given(st.lists(values, max_size=5))
def test_arguments_come_back(arguments: list[str]) -> None:
    assert split_new_syntax(quote_arguments(arguments)) == arguments


@given(st.dictionaries(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]*", fullmatch=True), values, max_size=5))
def test_environments_come_back(environment: dict[str, str]) -> None:
    pairs = dict(word.split("=", 1) for word in split_new_syntax(quote_environment(environment)))
    assert pairs == environment


@pytest.mark.pool
def test_a_real_job_sees_its_environment(queue: ScheddClient, tmp_path: Any) -> None:
    tmp_path.chmod(0o755)
    environment = {
        "PLAIN": "a b",
        "QUOTES": 'it\'s "so"',
        "DOLLAR": "$(HOME) $x $$",
        "EMPTY": "",
        "TAIL": "x\\",
    }
    output = tmp_path / "out"
    commands = {
        "executable": "/usr/bin/env",
        "transfer_executable": "false",
        "arguments": quote_arguments(["-0"]),
        "environment": quote_environment(environment),
        "output": str(output),
        "should_transfer_files": "YES",
    }
    (job,) = queue.submit(commands, 1)
    deadline = time.monotonic() + 40
    while queue.query(f"ClusterId == {job.split('.')[0]}", ["ClusterId"]):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    seen = dict(pair.split("=", 1) for pair in output.read_text().split("\0") if pair)
    assert {name: seen.get(name) for name in environment} == environment


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"environment": {"A": "x\ny"}}, ["worker.environment['A']", "line break"]),
        ({"environment": {"A B": "x"}}, ["worker.environment", "'A B'"]),
        ({"environment": {"A": "$$(Name)"}}, ["worker.environment['A']", "$$(Name)", "remove"]),
        ({"accounting_group": "physics\nqueue 9"}, ["worker.accounting_group", "line break"]),
        ({"container_image": "a\nb"}, ["worker.container_image", "line break"]),
        ({"requirements": "Memory >"}, ["worker.requirements", "Memory >", "no ClassAd expression"]),
        ({"requirements": "true) || (true"}, ["worker.requirements"]),
        ({"requirements": ""}, None),
        ({"extra_submit": {"executable": "/bin/sh"}}, ["worker.extra_submit", "executable"]),
        ({"extra_submit": {"x": "1\nqueue 9"}}, ["worker.extra_submit['x']", "line break"]),
        ({"extra_submit": {"x = 1\ny": "1"}}, ["worker.extra_submit", "no submit command"]),
    ],
)
def test_wrong_settings_are_named(spec: dict[str, Any], words: list[str] | None) -> None:
    if words is None:
        assert "requirements" not in describe(spec=spec)
        return
    with pytest.raises(WorkerJobError) as caught:
        describe(spec=spec)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "command",
    ["Requirements", "request_memory", "+RequestMemory", "MY.PeriodicRemove",
     "+PrefectFlowRunId", "My.HTCDaskX", "env",
     " universe ", "+LeaveJobInQueue", "job_lease_duration", "My.JobLeaseDuration", "+JobBatchName", "queue"],
)  # fmt: skip
def test_a_site_may_not_replace_what_makes_a_worker(command: str) -> None:
    with pytest.raises(WorkerJobError, match=r"worker\.extra_submit"):
        checked_extra_submit({command: "x"})


def test_a_site_may_add_its_own() -> None:
    extra = {"+ProjectName": '"physics"', "My.DESIRED_Sites": '"A,B"', "concurrency_limits": "db", "rank": "Memory"}
    commands = describe(spec={"extra_submit": extra})
    assert {name: commands[name] for name in extra} == extra
    htcondor2.Submit(commands)


@pytest.mark.parametrize(
    ("command", "value", "words"),
    [
        ("+ProjectName", "cms physics", ["quotes of its own: '\"cms physics\"'"]),
        ("My.X", "1 +", ["manual"]),
        ("+Sites", "A, B", ["'\"A, B\"'"]),
        ("rank", "Memory >", ["worker.extra_submit['rank'] = 'Memory >'"]),
        ("periodic_hold", "time( > 3", ["periodic_hold"]),
        ("+X", '"cms', ["no ClassAd expression"]),
    ],
)
def test_a_value_that_is_no_expression_is_refused_at_once(command: str, value: str, words: list[str]) -> None:
    with pytest.raises(WorkerJobError) as caught:
        checked_extra_submit({command: value})
    assert all(word in str(caught.value) for word in [f"worker.extra_submit[{command!r}] = {value!r}", *words])


@pytest.mark.parametrize(
    ("command", "value"),
    [
        ("+ProjectName", '"cms physics"'),
        ("+Path", '"C:\\new\\q"'),  # a backslash is itself in a submit description
        ("My.X", ""),
        ("+X", "$(Cluster) $(Process)"),
        ("+X", '"$$(Machine) it is"'),
        ("+X", '{ "a", "b" }'),
        ("concurrency_limits", "db, tape:2"),
        ("notify_user", "a b"),
    ],
)
def test_what_htcondor_takes_is_taken(command: str, value: str) -> None:
    assert checked_extra_submit({command: value}) == {command: value}


def test_a_word_without_quotes_is_worth_a_word() -> None:
    extra = {"+ProjectName": "cms", "+A": '"cms"', "+B": "true", "My.C": "7", "+D": "a + b", "rank": "Memory"}
    (text,) = bare_words(extra)
    assert "worker.extra_submit['+ProjectName'] = 'cms'" in text and "'\"cms\"'" in text


def test_what_htcondor_says_leads_to_the_setting() -> None:
    extra = {"+ProjectName": "cms physics", "X509UserProxy": "/no/p", "+X": "1"}
    spec = WorkerSpec(extra_submit=extra, accounting_group="a b", requirements="HasGPU")
    said = "Parse error in expression: ProjectName = cms physics"
    assert settings_in(said, spec, "worker") == ["worker.extra_submit['+ProjectName'] = 'cms physics'"]
    assert settings_in("unable to read proxy file", spec, "workers.gpu") == [
        "workers.gpu.extra_submit['X509UserProxy'] = '/no/p'"
    ]
    assert settings_in("Invalid accounting_group: a b", spec, "worker") == ["worker.accounting_group = 'a b'"]
    assert settings_in("it is Friday", spec, "worker") == []


def test_requirements_are_kept_as_they_are() -> None:
    commands = describe(spec={"requirements": 'OpSysAndVer == "Debian12" &&\n  HasGPU'})
    assert commands["requirements"] == 'OpSysAndVer == "Debian12" && HasGPU'


@given(names, names, st.integers(1, 9), st.integers(1, 9))
def test_constraints_mean_one_cluster_and_one_flow_run(one: str, other: str, attempt: int, before: int) -> None:
    def matches(constraint: str, **attributes: Any) -> bool:
        ad = classad2.ClassAd(attributes)
        ad["Wanted"] = classad2.ExprTree(constraint)
        return ad.eval("Wanted") is True

    one, other = (name.replace("\x00", "") for name in (one, other))
    assert matches(cluster_constraint(one), HTCDaskClusterName=one)
    # ClassAd's == takes no account of case, and the names that matter are hexadecimal.
    if one.casefold() != other.casefold():
        assert not matches(cluster_constraint(one), HTCDaskClusterName=other)
    assert not matches(cluster_constraint(one))
    assert matches(flow_run_constraint(one), PrefectFlowRunId=one)
    earlier = flow_run_constraint(one, before_attempt=before)
    assert matches(earlier, PrefectFlowRunId=one, HTCDaskAttempt=attempt) == (attempt < before)


def test_sizes_are_rounded_up_to_what_htcondor_counts_in() -> None:
    commands = describe(spec={"memory": 2**20 + 1, "disk": 1025, "cpus": 3, "gpus": 2, "priority": -5})
    assert [commands[f"request_{what}"] for what in ("memory", "disk", "cpus", "gpus")] == ["2", "2", "3", "2"]
    assert commands["priority"] == "-5"


def test_the_lease_is_in_every_job() -> None:
    commands = describe()
    now = int(time.time())
    for status, expired, removed in [
        (1, 5, True),
        (1, -5, False),
        (5, 5, True),
        (2, 5, False),
        (2, 55, False),
        (2, 65, True),
    ]:
        ad = classad2.ClassAd({"JobStatus": status, "HTCDaskLeaseExpires": now - expired})
        ad["Remove"] = classad2.ExprTree(commands["periodic_remove"])
        assert ad.eval("Remove") is removed, (status, expired)
    assert commands["My.HTCDaskLeaseExpires"] == "1234"
    assert commands["job_lease_duration"] == "600"
    assert commands["leave_in_queue"] == "false"


@pytest.mark.pool
def test_the_shadow_removes_a_running_job_by_its_lease(queue: ScheddClient) -> None:
    rule = {name: describe()[name] for name in ("periodic_remove", "My.PeriodicRemoveReason")}
    commands = {"executable": "/bin/sleep", "transfer_executable": "false", "arguments": "300", **rule}
    (job,) = queue.submit({**commands, "My.HTCDaskLeaseExpires": str(int(time.time()) + 600)}, 1)
    constraint = f"ClusterId == {job.split('.')[0]}"
    wait_until(lambda: queue.query(f"{constraint} && JobStatus == 2", ["ClusterId"]), 40, "the job runs")
    queue.renew(constraint, 4 - RUNNING_GRACE)
    assert queue.query(constraint, ["ClusterId"]), "it has its grace"
    wait_until(lambda: not queue.query(constraint, ["ClusterId"]), 30, "the job is removed")
    (ad,) = queue.history(constraint, ["RemoveReason"], 1)
    assert ad["RemoveReason"] == LEASE_REASON


def test_a_cluster_without_a_flow_has_no_flow_in_its_ads() -> None:
    commands = describe(flow_run=None)
    assert not [name for name in commands if "Prefect" in name]
    assert commands["My.JobBatchName"] == f'"{cluster_digest("c0ffee")}"'


@given(st.integers(1, 10**9), st.integers(0, 10**5), st.integers(0, 100))
def test_worker_names_tell_their_job(cluster: int, proc: int, starts: int) -> None:
    job = f"{cluster}.{proc}"
    assert job_of_worker(worker_name(job, starts)) == job


@pytest.mark.parametrize(
    "name", ["tcp://1.2.3.4:5", "htcdask-", "htcdask-1.2", "htcdask-1.2-x", "xhtcdask-1.2-3", 7, None]
)
def test_other_workers_have_no_job(name: object) -> None:
    assert job_of_worker(name) is None


def test_stderr_comes_as_it_is_written_where_the_schedd_sees_this_host() -> None:
    assert describe()["stream_error"] == "true"
    assert "stream_error" not in describe(files=JobFiles("/tmp", "start.py", (), (), None))
