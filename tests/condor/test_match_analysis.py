"""Why jobs wait: from slots and a job's requirements to counts, and from those to words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import classad2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_htcdask.condor.diagnosis import Category
from prefect_htcdask.condor.diagnosis_idle import Request, Share, diagnose_idle
from prefect_htcdask.condor.match_analysis import MatchAnalysis, analyse, conjuncts, unknown_references
from prefect_htcdask.condor.submit_description import MIB

# As condor_submit writes them; in a slot, as condor_startd does.
REQUIREMENTS = (
    '(TARGET.Arch == "X86_64") && (TARGET.OpSys == "LINUX") && (TARGET.Disk >= RequestDisk) && '
    "(TARGET.Memory >= RequestMemory) && (TARGET.Cpus >= RequestCpus) && (TARGET.HasFileTransfer)"
)
LIMITS = "MY.Cpus > 0 && TARGET.RequestCpus <= MY.Cpus && TARGET.RequestMemory <= MY.Memory"


def job(requirements: str = REQUIREMENTS, **attributes: Any) -> classad2.ClassAd:
    ad = classad2.ClassAd({"RequestCpus": 1, "RequestMemory": 1024, "RequestDisk": 1000, **attributes})
    ad["Requirements"] = classad2.ExprTree(requirements)
    return ad


def slot(kind: str = "Partitionable", start: str = "true", **changes: Any) -> classad2.ClassAd:
    whole = {"Cpus": 4, "Memory": 8000, "Disk": 10_000}
    ad = classad2.ClassAd(
        {
            "SlotType": kind,
            "State": "Unclaimed",
            "Arch": "X86_64",
            "OpSys": "LINUX",
            "HasFileTransfer": True,
            **{f"TotalSlot{name}": amount for name, amount in whole.items()},
            **whole,
            **changes,
        }
    )
    ad["Requirements"] = classad2.ExprTree("Start && WithinResourceLimits")
    ad["Start"] = classad2.ExprTree(start)
    ad["WithinResourceLimits"] = classad2.ExprTree(LIMITS)
    return ad


def dynamic(**changes: Any) -> classad2.ClassAd:
    return slot("Dynamic", **{"State": "Claimed", "Cpus": 1, "Memory": 1024, **changes})


def full() -> list[classad2.ClassAd]:
    """A machine whose four cores are all taken."""
    return [slot(Cpus=0, Memory=3904), *(dynamic() for _ in range(4))]


def test_the_slots_of_a_pool() -> None:
    analysis = analyse(job(), [slot(), *full(), slot("Static"), slot("Static", State="Claimed"), slot(Arch="ARM")])
    assert analysis == MatchAnalysis(
        slots=5, fitting=4, refusing=0, free=2, claimed=5, open=3, largest_memory=8000, largest_cpus=4,
        conditions=analysis.conditions,
    )  # fmt: skip
    (condition,) = analysis.conditions
    assert (condition.text, condition.excluded, condition.excluded_alone) == ('TARGET.Arch == "X86_64"', 1, 1)


def test_a_slot_is_judged_by_what_it_was_before_it_was_divided() -> None:
    used = slot(Memory=100, Cpus=1)
    before = str(used)
    analysis = analyse(job(RequestMemory=4000), [used])
    assert (analysis.fitting, analysis.free) == (1, 0)
    assert str(used) == before, "nobody else's ads are changed"


def test_a_policy_that_cannot_be_judged_is_not_held_against_a_slot() -> None:
    assert analyse(job(), [slot(start="NodeIsHealthy")]).refusing == 0
    assert analyse(job(), [slot(start='TARGET.ProjectName is "cms"')]).refusing == 1
    assert analyse(job(ProjectName="cms"), [slot(start='TARGET.ProjectName is "cms"')]).free == 1


def test_what_has_to_be_asked_of_slots() -> None:
    wanted = unknown_references(job("TARGET.HasCVMFS && TARGET.Memory > RequestMemory"), [])
    assert wanted == {"hascvmfs", "memory"}
    # As the bindings of release 25 write it.
    version = 'versionGE(split(TARGET.CondorVersion)[1], "25.12.0") || TARGET.Disk > 1'
    assert unknown_references(job(version, CondorVersion="25.12.0"), []) == {"condorversion", "disk"}
    slots = [slot(start='NodeIsHealthy && TARGET.ProjectName =?= "cms" && RequestCpus < 3'), slot()]
    assert unknown_references(job(ProjectName="cms"), slots) == {"nodeishealthy"}


@pytest.mark.parametrize(
    ("expression", "parts"),
    [
        ("true", ["true"]),
        ("a && b&&c", ["a", "b", "c"]),
        ("((a) && (b && (c)))", ["a", "b", "c"]),
        ("a && (b || c)", ["a", "b || c"]),
        ("a || b && c", ["a || b && c"]),
        ("a && b ? c : d", ["a && b ? c : d"]),
        ('x == "a && (b" && y', ['x == "a && (b"', "y"]),
        ('x == "\\"&&" && y', ['x == "\\"&&"', "y"]),
        ("x =?= 1 && y =!= 2", ["x =?= 1", "y =!= 2"]),
        ("f(a && b) && {c && d}[0]", ["f(a && b)", "{c && d}[0]"]),
        ("(a) && (a)", ["a"]),
        ("(a && b) || (c)", ["(a && b) || (c)"]),
    ],
)
def test_the_conditions_of_an_expression(expression: str, parts: list[str]) -> None:
    assert conjuncts(expression) == parts


names = st.sampled_from(["A", "B", "C", "D"])
leaves = st.one_of(names, st.sampled_from(["true", "false", "undefined", 'S == "x && (y"', "N > 1", "A =?= true"]))
expressions = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["&&", "||"]), inner).map(" ".join),
        inner.map(lambda text: f"({text})"),
        st.tuples(inner, inner, inner).map(lambda three: "({} ? {} : {})".format(*three)),
    ),
    max_leaves=12,
)
scopes = st.fixed_dictionaries({name: st.booleans() for name in "ABCD"}, optional={"S": st.just("x && (y")})


@given(expressions, scopes)
def test_an_expression_holds_where_all_its_conditions_do(expression: str, values: dict[str, Any]) -> None:
    ad = classad2.ClassAd({**values, "N": 2})
    whole = classad2.ExprTree(expression)
    parts = [classad2.ExprTree(part) for part in conjuncts(str(whole))]
    assert (whole.eval(ad) is True) == all(part.eval(ad) is True for part in parts)


def diagnosis(slots: list[classad2.ClassAd], waiting: int = 3, **more: Any) -> Any:
    options = {name: more.pop(name) for name in ("settings", "share", "rejected") if name in more}
    ad = job(**more)
    request = Request.of({name: ad.eval(name) for name in ad})
    return diagnose_idle(analyse(ad, slots), request, waiting=waiting, **options)


@pytest.mark.parametrize(
    ("slots", "ask", "category", "words"),
    [
        ([], {}, Category.POOL_EMPTY, ["3 worker jobs wait: the pool has no slot"]),
        (
            [slot(), slot()],
            {"RequestMemory": 64 * 1024},
            Category.NO_SLOT_LARGE_ENOUGH,
            ["0 of 2 slots have 64 GiB of memory (the most that one has: 7.812 GiB)", "(lower worker.memory)"],
        ),
        (
            [slot(), *full()],
            {"RequestCpus": 8, "settings": "workers.gpu"},
            Category.NO_SLOT_LARGE_ENOUGH,
            ["0 of 2 slots have 8 cpus (the most that one has: 4 cpus) (lower workers.gpu.cpus)"],
        ),
        (
            [slot(), slot(Cpus=16, TotalSlotCpus=16)],
            {"RequestCpus": 8, "RequestMemory": 9000},
            Category.NO_SLOT_LARGE_ENOUGH,
            ["0 of 2 slots have 8.789 GiB of memory", "worker.memory = 8.789 GiB of memory excludes 2 (1 alone)",
             "worker.cpus = 8 cpus excludes 1"],
        ),
        (
            [slot(Memory=1, TotalSlotMemory=1), slot(Cpus=1, TotalSlotCpus=1)],
            {"RequestCpus": 2},
            Category.NO_SLOT_LARGE_ENOUGH,
            ["0 of 2 slots have", "worker.memory = 1 GiB of memory excludes 1 (1 alone)", "lower worker."],
        ),
        (
            [slot(), slot(HasCVMFS=True, Memory=10, TotalSlotMemory=10)],
            {"requirements": f"(TARGET.HasCVMFS) && {REQUIREMENTS}"},
            Category.NO_SLOT_MATCHES,
            ["0 of 2 slots meet all that they ask for", "`TARGET.HasCVMFS` excludes 1 (1 alone)",
             "worker.memory = 1 GiB of memory excludes 1 (1 alone)", "worker.requirements"],
        ),
        (
            [slot(), slot()],
            {"requirements": f"false && {REQUIREMENTS}"},
            Category.NO_SLOT_MATCHES,
            ["3 worker jobs wait: 0 of 2 slots meet `false` (check worker.requirements"],
        ),
        (
            [slot(start="TARGET.ProjectName =?= \"cms\""), slot(Arch="ARM")],
            {},
            Category.SLOTS_REFUSE,
            ["1 of 2 slots meet what they ask for, but none takes them", "worker.accounting_group"],
        ),
        (full(), {}, Category.POOL_FULL, ["the pool is full: 4 of 4 slots claimed (wait,", "worker.start_timeout"]),
        (
            [slot(Memory=100), dynamic()],
            {},
            Category.POOL_FULL,
            ["the pool is full: 1 of 2 slots claimed, and the other one has no room for 1 cpu, 1 GiB of memory"],
        ),
        ([slot("Static", State="Claimed")], {"waiting": 1}, Category.POOL_FULL, ["1 worker job waits: the pool is"]),
        ([slot()], {}, Category.WAITING, ["1 slot has room for them, and the negotiator has not matched them yet"]),
        ([slot()], {"rejected": "no match found "}, Category.WAITING, ["(its last word: no match found)"]),
        (
            [slot()],
            {"rejected": "submitter limit exceeded", "share": Share(500.0, 20)},
            Category.LIMIT_REACHED,
            ["submitter limit exceeded; you use 20 of the pool's slots at priority 500", "worker.accounting_group"],
        ),
        (full(), {"rejected": "concurrency limit x reached"}, Category.LIMIT_REACHED, ["concurrency limit x reached"]),
        (full(), {"share": Share(500.0, 4)}, Category.POOL_FULL, ["slots claimed; you use 4 of the pool's slots"]),
        (
            full(),
            {"share": Share(5000.0, 1, ahead=2, used_ahead=3)},
            Category.LOW_PRIORITY,
            ["4 of 4 slots claimed; your priority: you use 1 of the pool's slots at priority 5,000, 2 users with a "
             "better one use 3"],
        ),
    ],
)  # fmt: skip
def test_why_jobs_wait(
    slots: list[classad2.ClassAd], ask: dict[str, Any], category: Category, words: list[str]
) -> None:
    found = diagnosis(slots, **ask)
    assert found.category is category, found
    assert [word for word in words if word not in str(found)] == [], str(found)


def test_large_numbers_can_be_read() -> None:
    analysis = MatchAnalysis(slots=214, fitting=200, refusing=0, free=0, claimed=3201, open=0)
    text = str(diagnose_idle(analysis, Request(cpus=1, memory=64 * 1024 * MIB), waiting=5000))
    assert "5,000 worker jobs wait: the pool is full: 3,201 of 3,201 slots claimed" in text


counts = st.integers(0, 5000)


@given(counts, counts, counts, counts, counts, counts, st.integers(1, 5000), st.text(max_size=20))
def test_whatever_the_numbers_there_are_words(
    slots: int, fitting: int, refusing: int, free: int, claimed: int, opened: int, waiting: int, rejected: str
) -> None:
    fitting = min(slots, fitting)
    analysis = MatchAnalysis(slots, fitting, min(fitting, refusing), min(fitting, free), claimed, opened)
    if slots and not fitting:
        analysis = replace(analysis, conditions=analyse(job("false"), [slot()]).conditions)
    found = diagnose_idle(analysis, Request(), waiting=waiting, rejected=rejected)
    assert found.summary and found.remedy
