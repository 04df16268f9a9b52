"""What the policy must never do, whatever demand and supply are."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from prefect_htcdask.scaling.policy import Decision, Demand, PolicySettings, Supply, Target, wanted_workers
from prefect_htcdask.scaling.policy import decide as decide_now

NOW = 1000.0


def decide(demand: Demand | None, supply: Supply, target: Target, how: PolicySettings) -> Decision:
    return decide_now(demand, supply, dataclasses.replace(how, target=target), NOW)


@st.composite
def situations(draw: st.DrawFn) -> tuple[Demand, Supply]:
    """A demand and a supply that fit together: who is busy has tasks in hand."""
    pending = draw(st.lists(st.integers(0, 999), unique=True, max_size=30))
    idle = draw(st.dictionaries(st.integers(0, 99), st.floats(0, 100), max_size=20))
    busy = draw(st.dictionaries(st.integers(100, 199), st.integers(1, 20), max_size=20))
    supply = Supply(
        pending=tuple(f"{number}.0" for number in pending),
        idle={f"idle-{number}": NOW - seconds for number, seconds in idle.items()},
        busy=tuple(f"busy-{number}" for number in busy),
        unstarted=draw(st.integers(0, len(pending))),
    )
    demand = Demand(queued=draw(st.integers(0, 500)), in_hand={f"busy-{number}": n for number, n in busy.items()})
    failures = draw(st.integers(0, 6))
    since = draw(st.floats(0, 100))
    return demand, dataclasses.replace(supply, failures=failures, last_failure=NOW - since if failures else None)


@st.composite
def ranges(draw: st.DrawFn) -> Target:
    low = draw(st.integers(0, 40))
    return Target(minimum=low, maximum=draw(st.integers(max(low, 1), 80)))


fixed = st.integers(0, 60).map(lambda n: Target(fixed=n))
settings = st.builds(
    PolicySettings,
    threads=st.integers(1, 8),
    residence=st.floats(0, 60),
    max_idle_jobs=st.integers(0, 50),
    max_failures=st.integers(1, 5),
)


def after(supply: Supply, decision: Decision) -> int:
    """Workers there are or will be once the decision is carried out."""
    return supply.total + decision.submit - len(decision.remove_pending) - len(decision.retire)


@given(situations(), st.one_of(ranges(), fixed), settings)
def test_a_decision_names_workers_that_exist_and_does_not_grow_and_shrink_at_once(
    situation: tuple[Demand, Supply], target: Target, how: PolicySettings
) -> None:
    demand, supply = situation
    decision = decide(demand, supply, target, how)
    assert decision.submit >= 0
    assert not (decision.submit and (decision.remove_pending or decision.retire))
    assert set(decision.remove_pending) <= set(supply.pending)
    assert set(decision.retire) <= set(supply.idle) | set(supply.busy)
    assert len(set(decision.remove_pending)) == len(decision.remove_pending)
    assert len(set(decision.retire)) == len(decision.retire)
    assert decision.changes == bool(decision.reason)


@given(situations(), ranges(), settings)
def test_never_above_the_maximum_nor_below_the_minimum(
    situation: tuple[Demand, Supply], target: Target, how: PolicySettings
) -> None:
    demand, supply = situation
    decision = decide(demand, supply, target, how)
    assert target.minimum <= decision.target <= target.maximum
    if decision.submit:
        assert after(supply, decision) <= target.maximum
    if decision.remove_pending or decision.retire:
        assert after(supply, decision) >= target.minimum


@given(situations(), ranges(), settings)
def test_a_busy_worker_is_never_chosen_while_adapting(
    situation: tuple[Demand, Supply], target: Target, how: PolicySettings
) -> None:
    demand, supply = situation
    assert not set(decide(demand, supply, target, how).retire) & set(supply.busy)


@given(situations(), ranges(), settings)
def test_a_worker_keeps_its_residence(situation: tuple[Demand, Supply], target: Target, how: PolicySettings) -> None:
    demand, supply = situation
    assert all(NOW - supply.idle[name] >= how.residence for name in decide(demand, supply, target, how).retire)


@given(situations(), st.one_of(ranges(), fixed), settings)
def test_pending_jobs_go_before_workers_and_idle_before_busy(
    situation: tuple[Demand, Supply], target: Target, how: PolicySettings
) -> None:
    demand, supply = situation
    decision = decide(demand, supply, target, how)
    if decision.retire:
        assert set(decision.remove_pending) == set(supply.pending)
    if set(decision.retire) & set(supply.busy):
        assert set(supply.idle) <= set(decision.retire)


@given(situations(), settings)
def test_the_newest_pending_jobs_go_first(situation: tuple[Demand, Supply], how: PolicySettings) -> None:
    _, supply = situation
    assume(len(supply.pending) > 1)
    decision = decide(Demand(), dataclasses.replace(supply, idle={}, busy=()), Target(fixed=1), how)
    assert set(decision.remove_pending) == set(supply.pending[1:])


@given(situations(), fixed)
def test_a_number_asked_for_by_name_is_met_exactly(situation: tuple[Demand, Supply], target: Target) -> None:
    demand, supply = situation
    supply = dataclasses.replace(supply, failures=0, last_failure=None)
    assert after(supply, decide(demand, supply, target, PolicySettings())) == target.fixed


@given(situations(), ranges(), st.integers(1, 8))
def test_constant_demand_gives_a_constant_target_while_workers_arrive(
    situation: tuple[Demand, Supply], target: Target, threads: int
) -> None:
    demand, supply = situation
    how = PolicySettings(threads=threads)
    arrived = dataclasses.replace(
        supply, pending=(), idle={**supply.idle, **{f"new-{job}": NOW for job in supply.pending}}, unstarted=0
    )
    assert decide(demand, supply, target, how).target == decide(demand, arrived, target, how).target


@given(situations(), ranges(), settings)
def test_what_is_decided_once_is_not_decided_again(
    situation: tuple[Demand, Supply], target: Target, how: PolicySettings
) -> None:
    demand, supply = situation
    decision = decide(demand, supply, target, how)
    gone = set(decision.remove_pending) | set(decision.retire)
    new = tuple(f"new-{number}" for number in range(decision.submit))
    settled = dataclasses.replace(
        supply,
        pending=tuple(job for job in supply.pending if job not in gone) + new,
        idle={name: seconds for name, seconds in supply.idle.items() if name not in gone},
        busy=tuple(name for name in supply.busy if name not in gone),
        unstarted=supply.unstarted + decision.submit,
    )
    assert not decide(demand, settled, target, how).changes


@given(situations(), ranges(), settings, st.integers(0, 100))
def test_more_demand_never_gives_fewer_workers(
    situation: tuple[Demand, Supply], target: Target, how: PolicySettings, more: int
) -> None:
    demand, supply = situation
    decision = decide(demand, supply, target, how)
    larger = decide(dataclasses.replace(demand, queued=demand.queued + more), supply, target, how)
    assert larger.target >= decision.target
    assert after(supply, larger) >= after(supply, decision)


@given(st.integers(1, 5000), st.integers(1, 8), st.integers(1, 1000))
def test_a_burst_is_answered_in_one_decision(tasks: int, threads: int, maximum: int) -> None:
    how = PolicySettings(threads=threads, max_idle_jobs=10_000)
    decision = decide(Demand(queued=tasks), Supply(), Target(maximum=maximum), how)
    assert decision.submit == min(-(-tasks // threads), maximum)


@given(st.one_of(ranges(), fixed), situations(), settings)
def test_an_unknown_demand_keeps_everything(
    target: Target, situation: tuple[Demand, Supply], how: PolicySettings
) -> None:
    _, supply = situation
    decision = decide(None, supply, target, how)
    assert not decision.changes
    assert decision.target == supply.total


@given(situations(), st.one_of(ranges(), fixed), settings)
def test_failures_delay_submission_and_end_it(
    situation: tuple[Demand, Supply], target: Target, how: PolicySettings
) -> None:
    demand, supply = situation
    assume(supply.last_failure is not None)
    decision = decide(demand, supply, target, how)
    if supply.failures >= how.max_failures or NOW - (supply.last_failure or 0) < 2 ** (supply.failures - 1):
        assert not decision.submit
    assert bool(decision.gives_up) == (decision.target > supply.total and supply.failures >= how.max_failures)


@given(situations(), ranges(), settings)
def test_idle_jobs_in_the_queue_stay_below_their_cap(
    situation: tuple[Demand, Supply], target: Target, how: PolicySettings
) -> None:
    demand, supply = situation
    decision = decide(demand, supply, target, how)
    assert not decision.submit or supply.unstarted + decision.submit <= how.max_idle_jobs


def test_queued_tasks_keep_idle_workers() -> None:
    supply = Supply(idle={"a": NOW - 99.0, "b": NOW - 99.0}, pending=("1.0",))
    assert not decide(Demand(queued=1), supply, Target(maximum=9), PolicySettings(residence=1)).changes


def test_a_task_in_hand_wants_its_thread() -> None:
    assert (
        wanted_workers(Demand(queued=3, in_hand={"a": 5}), PolicySettings(target=Target(maximum=100), threads=2)) == 4
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"fixed": -1}, "scale(-1)"),
        ({"minimum": 3, "maximum": 2}, "adapt(minimum=3, maximum=2)"),
        ({"minimum": -1}, "adapt(minimum=-1"),
    ],
)
def test_a_target_that_makes_no_sense_is_refused(arguments: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        Target(**arguments)
    assert words in str(caught.value)
