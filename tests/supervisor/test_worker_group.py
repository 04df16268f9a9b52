"""What the supervisor knows of one worker group."""

from __future__ import annotations

import dataclasses
from typing import Any

import classad2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_htcdask.condor.address import ScheddAddress
from prefect_htcdask.condor.job_events import JobRecord
from prefect_htcdask.condor.submit_description import WorkerSpec, checked_expression
from prefect_htcdask.supervisor.policy import Demand, Supply, Target, decide
from prefect_htcdask.supervisor.protocol import GroupPlan, group_of, target_of
from prefect_htcdask.supervisor.worker_group import WorkerGroup, idle_job_caps


def a_group(name: str = "default", **target: int) -> WorkerGroup:
    wanted = Target(**(target or {"fixed": 2}))
    return WorkerGroup(name, GroupPlan(WorkerSpec(cpus=2), start_timeout=30.0, target=wanted), "workers", wanted)


def record(submitted: float, started: float, starts: int = 1) -> JobRecord:
    return JobRecord("1.0", submitted=submitted, started=started, starts=starts)


def test_it_learns_how_long_jobs_wait_and_workers_take_to_join() -> None:
    group = a_group()
    assert group.supply(Supply()).waits == () and group.supply(Supply()).boot == Supply().boot
    group.started(record(100.0, 130.0))
    group.started(record(100.0, 500.0, starts=2))
    for seconds in (2.0, 3.0, 9.0):
        group.joined(record(100.0, 130.0), 130.0 + seconds)
    group.joined(record(100.0, 130.0), None)
    supply = group.supply(Supply(pending=("1.0",)))
    assert (supply.waits, supply.boot, supply.pending) == ((30.0,), 3.0, ("1.0",))
    for wait in range(60):
        group.started(record(100.0, 100.0 + wait))
    assert list(group.supply(Supply()).waits) == list(range(10, 60)), "the latest, oldest first"


def demand_and_decision(group: WorkerGroup, now: float) -> tuple[int, str]:
    decision = decide(Demand(queued=4), group.supply(Supply()), group.policy(30.0, 100, 3), now)
    return decision.submit, decision.gives_up


def test_bad_starts_in_a_row_end_in_giving_up_until_somebody_asks_again() -> None:
    group = a_group()
    for now in (1.0, 2.0, 3.0):
        group.failed(record(0.0, 0.0), now)
    submit, gives_up = demand_and_decision(group, 1000.0)
    assert submit == 0 and "3 workers in a row" in gives_up
    group.gave_up = True
    group.wants(Target(fixed=2))
    assert demand_and_decision(group, 1000.0) == (2, "") and not group.gave_up


def test_a_worker_that_joins_makes_up_for_bad_starts() -> None:
    group = a_group()
    group.failed(record(0.0, 0.0), 1.0)
    assert demand_and_decision(group, 1.1) == (0, ""), "not at once"
    assert demand_and_decision(group, 100.0) == (2, "")
    group.joined(record(0.0, 0.0), None)
    assert demand_and_decision(group, 1.2) == (2, "")


def failed_on(group: WorkerGroup, *slots: str | None) -> None:
    for slot in slots:
        bad = record(0.0, 0.0)
        bad.host = slot
        group.failed(bad, 1.0)


def test_a_bad_machine_counts_once_where_there_are_others() -> None:
    group = a_group()
    failed_on(group, "slot1_1@bad.example")
    assert group.suspects() == set(), "once is no proof"
    failed_on(group, "slot1_2@bad.example", "slot1_3@bad.example")
    assert group.suspects() == {"bad.example"}
    assert group.suspects() == set(), "until there is one more"
    assert group.avoid({"bad.example"}, {"bad.example", "good.example"}) == {"bad.example"}
    assert group.failures == 1
    assert demand_and_decision(group, 100.0) == (2, "")
    failed_on(group, "slot1@good.example", None)
    assert group.failures == 3 and "3 workers in a row" in demand_and_decision(group, 100.0)[1]
    group.wants(Target(fixed=2))
    assert group.failures == 0 and not group.avoided, "whoever asks again may have repaired it"


@pytest.mark.parametrize("machines", [set(), {"bad"}, {"bad", "worse"}])
def test_a_bad_machine_is_not_avoided_where_there_is_no_better(machines: set[str]) -> None:
    group = a_group()
    failed_on(group, "slot1@worse", "slot1_1@bad", "slot1_2@bad")
    assert group.avoid(group.suspects(), machines) == set()
    assert group.failures == 3 and group.job_spec is group.spec


@pytest.mark.parametrize("own", [None, "HasCVMFS || Memory > 10"])
@pytest.mark.parametrize(("machine", "fits"), [("good", True), ("bad", False), ("worse", False)])
def test_later_jobs_keep_off_a_bad_machine(own: str | None, machine: str, fits: bool) -> None:
    group = a_group()
    group.plan = dataclasses.replace(group.plan, spec=WorkerSpec(requirements=own))
    group.avoided |= {"bad", "worse"}
    job = classad2.ClassAd({"MyType": "Job"})
    job["Requirements"] = classad2.ExprTree(checked_expression(str(group.job_spec.requirements), "requirements"))
    slot = classad2.ClassAd({"MyType": "Machine", "Machine": machine, "Memory": 20})
    slot["Requirements"] = classad2.ExprTree("true")
    assert job.symmetricMatch(slot) is fits


def test_the_first_worker_may_take_its_time() -> None:
    group = a_group()
    assert not group.overdue(1e9), "nobody waits"
    group.wanted(2, 100.0)
    group.wanted(3, 120.0)
    assert not group.overdue(129.0) and group.overdue(130.0)
    group.wants(Target(fixed=1))
    assert not group.overdue(1e9), "whoever asks again waits anew"
    group.wanted(1, 200.0)
    assert not group.overdue(229.0) and group.overdue(231.0)
    group.wanted(0, 240.0)
    assert not group.overdue(1e9), "nobody waits any more"
    group.wanted(1, 250.0)
    assert group.overdue(280.0)
    group.joined(record(0.0, 0.0), None)
    assert not group.overdue(1e9)


def test_what_the_schedd_refuses_is_tried_again_ever_later() -> None:
    group = a_group()
    assert [group.refused(0.0) for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert group.submit_after == 60.0
    group.submitted()
    assert group.refused(0.0) == 1


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 300), min_size=1, max_size=6), st.integers(1, 300))
def test_groups_share_the_cap_on_idle_jobs(unstarted: dict[str, int], cap: int) -> None:
    caps = idle_job_caps(unstarted, cap)
    waiting = dict(unstarted)
    for name in waiting:
        # As the loop does it: each fills what is left to it, one after the other.
        waiting[name] = max(waiting[name], idle_job_caps(waiting, cap)[name])
    assert sum(waiting.values()) <= max(cap, sum(unstarted.values()))
    if len(unstarted) == 1:
        assert list(caps.values()) == [cap]


def test_a_group_s_burst_leaves_room_for_the_others() -> None:
    assert idle_job_caps({"cpu": 0, "gpu": 0}, 200) == {"cpu": 150, "gpu": 150}
    assert idle_job_caps({"cpu": 150, "gpu": 0}, 200) == {"cpu": 150, "gpu": 50}
    assert idle_job_caps({"cpu": 90, "gpu": 60}, 200) == {"cpu": 140, "gpu": 110}


def test_wishes() -> None:
    assert group_of({}, {"cpu": 1, "gpu": 2}) == "cpu"
    assert group_of({"group": "gpu"}, {"cpu": 1, "gpu": 2}) == "gpu"
    with pytest.raises(ValueError, match=r"group='tpu' is no worker group .* cpu, gpu"):
        group_of({"group": "tpu"}, {"cpu": 1, "gpu": 2})
    assert target_of({"op": "scale", "n": 3}) == Target(fixed=3)
    assert target_of({"op": "adapt", "minimum": 1, "maximum": 4}) == Target(minimum=1, maximum=4)
    with pytest.raises(ValueError, match="minimum"):
        target_of({"op": "adapt", "minimum": 5, "maximum": 4})


def test_a_plan_keeps_the_newest_target(a_plan: Any) -> None:
    plan = a_plan.with_target("gpu", Target(fixed=4))
    assert [group.target.fixed for group in plan.groups.values()] == [1, 4]
    assert [group.target.fixed for group in a_plan.groups.values()] == [1, 0]
    config = plan.config_of("gpu")
    assert (config["group"], config["nthreads"], config["resources"]) == ("gpu", 3, {"GPU": 1})
    assert (config["lifetime"], config["lifetime_stagger"]) == (60.0, 5.0)


@pytest.fixture
def a_plan() -> Any:
    from prefect_htcdask.supervisor.protocol import GatewayAccess, SupervisorConfig

    gpu = WorkerSpec(cpus=3, gpus=1, resources={"GPU": 1}, lifetime=60.0, lifetime_stagger=5.0)
    groups = {
        "cpu": GroupPlan(WorkerSpec(), 30.0, Target(fixed=1)),
        "gpu": GroupPlan(gpu, 30.0, Target(fixed=0)),
    }
    return SupervisorConfig(
        owner="o",
        parent_pid=1,
        access=GatewayAccess("", "", "", None, "c", "", "", ""),
        schedd=ScheddAddress(),
        groups=groups,
        worker_config={},
        worker_secrets={},
        flow_run=None,
        run_directory="",
        lease=1.0,
        scheduler_lease=1.0,
        lost_schedd=1.0,
        interval=1.0,
        residence=1.0,
        max_idle_jobs=1,
        max_failures=1,
    )
