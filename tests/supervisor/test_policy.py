"""What the policy must never do, whatever demand and supply are."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from prefect_htcdask.supervisor.policy import (
    Decision,
    Demand,
    PolicySettings,
    Supply,
    Target,
    backoff,
    decide,
    trial_pause,
    wanted_workers,
)

NOW = 1000.0


@st.composite
def situations(draw: st.DrawFn) -> tuple[Demand, Supply]:
    """A demand and a supply that fit together: who is busy has tasks in hand."""
    pending = draw(st.lists(st.integers(0, 999), unique=True, max_size=30))
    idle = draw(st.dictionaries(st.integers(0, 99), st.floats(0, 100), max_size=20))
    busy = draw(st.dictionaries(st.integers(100, 199), st.integers(1, 20), max_size=20))
    in_hand = {f"busy-{number}": count for number, count in busy.items()}
    names = [f"idle-{number}" for number in idle]
    failures = draw(st.sampled_from([0, 0, 0, 1, 2, 6]))
    supply = Supply(
        pending=tuple(f"{number}.0" for number in pending),
        unstarted=draw(st.integers(0, len(pending))),
        idle={name: NOW - seconds for name, seconds in zip(names, idle.values(), strict=True)},
        busy=tuple(in_hand),
        holding=frozenset(draw(st.lists(st.sampled_from(names), unique=True)) if names else ()),
        waits=tuple(draw(st.lists(st.floats(0, 500), max_size=60))),
        boot=draw(st.floats(0, 30)),
        failures=failures,
        last_failure=NOW - draw(st.floats(0, 100)) if failures else None,
    )
    tasks = draw(st.integers(0, 500))
    total = tasks + sum(in_hand.values())
    demand = Demand(
        queued=tasks,
        in_hand=in_hand,
        stacked=draw(st.integers(0, max(0, sum(in_hand.values()) - len(in_hand)))),
        coming=draw(st.dictionaries(st.integers(-2, 40).map(lambda n: n * 10.0), st.integers(1, 50), max_size=5)),
        work=total * draw(st.sampled_from([0.0, 0.5, 60.0, 3600.0])),
        unknown=draw(st.integers(0, total)),
        task_seconds=draw(st.sampled_from([0.0, 1.0, 100.0])),
    )
    return demand, supply


def ranges(lowest: int = 0) -> st.SearchStrategy[Target]:
    return st.tuples(st.integers(lowest, 40), st.integers(1, 80)).map(
        lambda pair: Target(minimum=pair[0], maximum=max(pair))
    )


fixed = st.integers(0, 60).map(lambda n: Target(fixed=n))


def settings(target: st.SearchStrategy[Target]) -> st.SearchStrategy[PolicySettings]:
    return st.builds(
        PolicySettings,
        target=target,
        group=st.sampled_from(["", "cpu"]),
        threads=st.integers(1, 8),
        residence=st.floats(0, 60),
        max_idle_jobs=st.integers(0, 50),
        max_failures=st.integers(1, 5),
    )


adapting = settings(ranges())
any_settings = settings(st.one_of(ranges(), fixed))


def after(supply: Supply, decision: Decision) -> int:
    """Workers there are or will be once the decision is carried out."""
    return supply.total + decision.submit - len(decision.remove_pending) - len(decision.retire)


def carried_out(supply: Supply, decision: Decision) -> Supply:
    """The supply once the decision is carried out."""
    gone = set(decision.remove_pending) | set(decision.retire)
    new = tuple(f"new-{number}" for number in range(decision.submit))
    return dataclasses.replace(
        supply,
        pending=tuple(job for job in supply.pending if job not in gone) + new,
        unstarted=min(supply.unstarted, len(supply.pending) - len(decision.remove_pending)) + decision.submit,
        idle={name: since for name, since in supply.idle.items() if name not in gone},
        busy=tuple(name for name in supply.busy if name not in gone),
        holding=supply.holding - gone,
    )


def without_failures(supply: Supply) -> Supply:
    return dataclasses.replace(supply, failures=0, last_failure=None)


@given(situations(), any_settings)
def test_a_decision_names_workers_that_exist_and_does_not_grow_and_shrink_at_once(
    situation: tuple[Demand, Supply], how: PolicySettings
) -> None:
    demand, supply = situation
    decision = decide(demand, supply, how, NOW)
    assert decision.submit >= 0
    assert not (decision.submit and (decision.remove_pending or decision.retire))
    assert set(decision.remove_pending) <= set(supply.pending)
    assert set(decision.retire) <= set(supply.idle) | set(supply.busy)
    assert len(set(decision.remove_pending)) == len(decision.remove_pending)
    assert len(set(decision.retire)) == len(decision.retire)
    assert decision.changes == bool(decision.reason)


@given(situations(), adapting)
def test_never_above_the_maximum_nor_below_the_minimum(situation: tuple[Demand, Supply], how: PolicySettings) -> None:
    demand, supply = situation
    decision = decide(demand, supply, how, NOW)
    assert how.target.minimum <= decision.target <= how.target.maximum
    if decision.submit:
        assert after(supply, decision) <= how.target.maximum
    if decision.remove_pending or decision.retire:
        assert after(supply, decision) >= how.target.minimum


@given(situations(), settings(ranges(lowest=1)))
def test_the_minimum_is_asked_for_whatever_there_is_to_do(
    situation: tuple[Demand, Supply], how: PolicySettings
) -> None:
    demand, supply = situation
    supply = without_failures(supply)
    how = dataclasses.replace(how, max_idle_jobs=1000)
    assert after(supply, decide(demand, supply, how, NOW)) >= how.target.minimum
    assert after(supply, decide(Demand(), supply, how, NOW)) >= how.target.minimum


@given(situations(), adapting)
def test_a_worker_with_a_task_in_hand_is_never_chosen_while_adapting(
    situation: tuple[Demand, Supply], how: PolicySettings
) -> None:
    demand, supply = situation
    # Nor where the two disagree: it may have got the task after the supply was looked at.
    demand = dataclasses.replace(demand, in_hand={**demand.in_hand, **dict.fromkeys([*supply.idle][:1], 1)})
    assert not set(decide(demand, supply, how, NOW).retire) & (set(supply.busy) | set(demand.in_hand))


@given(situations(), adapting)
def test_the_last_worker_stays_while_there_are_results(situation: tuple[Demand, Supply], how: PolicySettings) -> None:
    _, supply = situation
    supply = dataclasses.replace(supply, busy=())
    assume(supply.holding)
    how = dataclasses.replace(how, residence=0)
    for _ in range(2):
        decision = decide(Demand(), supply, how, NOW)
        # Where all others have to go, the results stay with one that holds some.
        left = set(supply.idle) - set(decision.retire)
        assert left & supply.holding if decision.retire else left
        supply = carried_out(supply, decision)
    if not how.target.minimum:
        assert supply.joined == 1


@given(situations(), adapting)
def test_workers_without_results_go_first(situation: tuple[Demand, Supply], how: PolicySettings) -> None:
    demand, supply = situation
    retire = set(decide(demand, supply, dataclasses.replace(how, residence=0), NOW).retire)
    if retire & supply.holding:
        assert set(supply.idle) - supply.holding <= retire


@given(situations(), adapting)
def test_a_worker_keeps_its_residence(situation: tuple[Demand, Supply], how: PolicySettings) -> None:
    demand, supply = situation
    assert all(NOW - supply.idle[name] >= how.residence for name in decide(demand, supply, how, NOW).retire)


def test_at_the_end_of_a_burst_workers_leave_together() -> None:
    how = PolicySettings(target=Target(maximum=100), residence=5)
    idle = {f"w{second}": float(second) for second in range(60)}
    left, decisions = {}, 0
    for now in range(100):
        supply = Supply(idle={name: since for name, since in idle.items() if since <= now and name not in left})
        retire = decide(Demand(), supply, how, float(now)).retire
        decisions += bool(retire)
        left.update({name: now - idle[name] for name in retire})
    assert decisions == 20, "of three, not sixty of one"
    assert min(left.values()) == 5 and max(left.values()) == 7
    # Who is alone, or whose time is over before another's, waits for nobody.
    assert decide(Demand(), Supply(idle={"a": 0.0, "b": 2.6}), how, 5.0).retire == ("a",)
    assert not decide(Demand(), Supply(idle={"a": 0.0, "b": 2.5}), how, 5.0).retire
    slow = dataclasses.replace(how, residence=600)
    assert decide(Demand(), Supply(idle={"a": 0.0, "b": 10.1}), slow, 600.0).retire == ("a",)


@given(situations(), adapting)
def test_no_worker_stays_much_longer_than_its_residence(situation: tuple[Demand, Supply], how: PolicySettings) -> None:
    _, supply = situation
    supply = dataclasses.replace(supply, holding=frozenset(), pending=(), busy=())
    how = dataclasses.replace(how, target=Target())
    long = {name for name, since in supply.idle.items() if NOW - since >= how.residence + min(how.residence / 2, 10)}
    assert long <= set(decide(Demand(), supply, how, NOW).retire)


@given(situations(), any_settings)
def test_workers_that_could_not_leave_are_left_alone(situation: tuple[Demand, Supply], how: PolicySettings) -> None:
    demand, supply = situation
    retire = decide(demand, supply, how, NOW).retire
    staying = dataclasses.replace(supply, staying=frozenset(retire[::2]))
    assert not staying.staying & set(decide(demand, staying, how, NOW).retire)


@given(situations(), any_settings)
def test_pending_jobs_go_before_workers_and_idle_before_busy(
    situation: tuple[Demand, Supply], how: PolicySettings
) -> None:
    demand, supply = situation
    decision = decide(demand, supply, how, NOW)
    if decision.retire:
        assert set(decision.remove_pending) == set(supply.pending)
    if set(decision.retire) & set(supply.busy):
        assert set(supply.idle) <= set(decision.retire)


@given(situations())
def test_the_newest_pending_jobs_go_first(situation: tuple[Demand, Supply]) -> None:
    _, supply = situation
    assume(len(supply.pending) > 1)
    supply = dataclasses.replace(supply, idle={}, busy=(), holding=frozenset())
    decision = decide(Demand(), supply, PolicySettings(target=Target(fixed=1)), NOW)
    assert set(decision.remove_pending) == set(supply.pending[1:])


@given(situations(), adapting)
def test_pending_jobs_stay_while_their_work_is_there(situation: tuple[Demand, Supply], how: PolicySettings) -> None:
    demand, supply = situation
    decision = decide(demand, supply, how, NOW)
    if decision.remove_pending:
        assert not demand.waiting(how.threads)
        soon = demand.ready_within(supply.arrival)
        assert after(supply, decision) * how.threads >= demand.tasks + soon or after(supply, decision) == len(
            supply.idle
        ) + len(supply.busy) - len(decision.retire)


@given(situations(), settings(fixed))
def test_a_number_asked_for_by_name_is_met_exactly(situation: tuple[Demand, Supply], how: PolicySettings) -> None:
    demand, supply = situation
    supply = without_failures(supply)
    assert after(supply, decide(demand, supply, how, NOW)) == how.target.fixed


@given(situations(), adapting)
def test_a_constant_demand_gives_a_constant_target_while_workers_arrive(
    situation: tuple[Demand, Supply], how: PolicySettings
) -> None:
    demand, supply = situation
    target = decide(demand, supply, how, NOW).target
    supply = carried_out(supply, decide(demand, supply, how, NOW))
    while supply.pending:
        # One joins; what it does is not told yet.
        first, *rest = supply.pending
        supply = dataclasses.replace(
            supply,
            pending=tuple(rest),
            unstarted=min(supply.unstarted, len(rest)),
            idle={**supply.idle, f"joined-{first}": NOW},
        )
        decision = decide(demand, supply, how, NOW)
        assert decision.target == target
        assert not decision.remove_pending
        assert not decision.retire


@given(st.integers(0, 300), adapting, st.floats(0, 300))
def test_a_constant_demand_gives_no_oscillation(tasks: int, how: PolicySettings, wait: float) -> None:
    """So many long tasks from here on, a worker joins each second: jobs are asked for, and nothing is taken back."""
    how = dataclasses.replace(how, residence=0)
    supply = Supply()
    asked = 0
    targets = set()
    for second in range(200):
        queued = max(0, tasks - how.threads * supply.joined)
        in_hand = {}
        for number in range(supply.joined):
            count = min(how.threads, tasks - how.threads * number)
            if count > 0:
                in_hand[f"w{number}"] = count
        supply = dataclasses.replace(
            supply,
            busy=tuple(in_hand),
            idle={f"w{number}": 0.0 for number in range(len(in_hand), supply.joined)},
            waits=[*supply.waits, wait],
        )
        demand = Demand(queued=queued, in_hand=in_hand, work=7200.0 * tasks, task_seconds=7200.0)
        decision = decide(demand, supply, how, float(second))
        assert not decision.remove_pending
        assert not decision.retire
        targets.add(decision.target)
        asked += decision.submit
        pending = len(supply.pending) + decision.submit
        joins = min(1, pending)
        supply = dataclasses.replace(
            supply,
            pending=tuple(f"{number}.0" for number in range(pending - joins)),
            unstarted=pending - joins,
            idle={**supply.idle, **({f"w{supply.joined}": float(second)} if joins else {})},
        )
    assert len(targets) == 1
    assert asked <= targets.pop()


@given(situations(), any_settings)
def test_what_is_decided_once_is_not_decided_again(situation: tuple[Demand, Supply], how: PolicySettings) -> None:
    demand, supply = situation
    decision = decide(demand, supply, how, NOW)
    if how.target.fixed is not None:
        demand = dataclasses.replace(
            demand, in_hand={name: n for name, n in demand.in_hand.items() if name not in decision.retire}
        )
    assert not decide(demand, carried_out(supply, decision), how, NOW).changes


@given(situations(), adapting, st.integers(0, 100), st.sampled_from(["queued", "coming", "stacked"]))
def test_more_demand_never_gives_fewer_workers(
    situation: tuple[Demand, Supply], how: PolicySettings, more: int, what: str
) -> None:
    demand, supply = situation
    decision = decide(demand, supply, how, NOW)
    # Each brings its own work: more tasks for the same work would be shorter ones.
    work = demand.work + more * demand.mean()
    if what == "queued":
        larger = dataclasses.replace(demand, queued=demand.queued + more, work=work)
    elif what == "coming":
        larger = dataclasses.replace(demand, coming={**demand.coming, 0.0: demand.coming.get(0.0, 0) + more})
    else:
        assume(demand.in_hand)
        name = next(iter(demand.in_hand))
        piled = {**demand.in_hand, name: demand.in_hand[name] + more}
        larger = dataclasses.replace(demand, in_hand=piled, stacked=demand.stacked + more, work=work)
    most = decide(larger, supply, how, NOW)
    assert most.target >= decision.target
    assert after(supply, most) >= after(supply, decision)


@given(st.integers(1, 5000), st.integers(1, 8), st.integers(1, 1000), st.floats(0, 1000), st.integers(0, 50))
def test_a_burst_is_answered_in_one_decision(
    tasks: int, threads: int, maximum: int, seconds: float, pending: int
) -> None:
    how = PolicySettings(target=Target(maximum=maximum), threads=threads, max_idle_jobs=5000)
    before = Supply(pending=tuple(f"{n}.0" for n in range(min(pending, maximum))), unstarted=min(pending, maximum))
    decision = decide(Demand(queued=tasks, task_seconds=seconds, work=tasks * seconds), before, how, NOW)
    assert after(before, decision) == max(min(-(-tasks // threads), maximum), before.total)


@given(situations(), any_settings)
def test_an_unknown_demand_keeps_everything(situation: tuple[Demand, Supply], how: PolicySettings) -> None:
    _, supply = situation
    decision = decide(None, supply, how, NOW)
    assert not decision.changes
    assert not decision.gives_up
    assert decision.target == supply.total


@given(situations(), any_settings)
def test_nothing_is_submitted_after_a_failure_until_its_time_has_passed(
    situation: tuple[Demand, Supply], how: PolicySettings
) -> None:
    demand, supply = situation
    assume(supply.last_failure is not None)
    assert supply.last_failure is not None
    decision = decide(demand, supply, how, NOW)
    if supply.last_failure + backoff(supply.failures) > NOW:
        assert not decision.submit
    if supply.failures < how.max_failures:
        assert not decision.gives_up
        later = supply.last_failure + backoff(supply.failures)
        assert decide(demand, supply, how, later).submit == decide(demand, without_failures(supply), how, later).submit


def test_the_backoff_grows_to_a_minute() -> None:
    assert [backoff(failures) for failures in (0, 1, 2, 3, 6, 7, 8, 2000)] == [0, 1, 2, 4, 32, 60, 60, 60]


@given(situations(), settings(ranges(lowest=1)))
def test_a_spent_failure_budget_ends_it_for_good(situation: tuple[Demand, Supply], how: PolicySettings) -> None:
    demand, supply = situation
    supply = dataclasses.replace(supply, failures=how.max_failures, last_failure=NOW - 1e6)
    supply = dataclasses.replace(supply, idle={}, busy=(), holding=frozenset())
    decision = decide(demand, supply, how, NOW)
    assert not decision.submit
    started = len(supply.pending) > supply.unstarted
    if decision.target <= supply.total or started:
        assert not decision.gives_up, "no more are wanted, or one may still come to work"
    else:
        assert decision.gives_up.startswith(f"{how.max_failures} workers in a row")


@given(situations(), any_settings, st.integers(0, 40), st.floats(0, 5000))
def test_with_a_spent_failure_budget_one_worker_is_tried_now_and_then_where_others_work(
    situation: tuple[Demand, Supply], how: PolicySettings, further: int, ago: float
) -> None:
    demand, supply = situation
    assume(supply.joined)
    failures = how.max_failures + further
    supply = dataclasses.replace(supply, failures=failures, last_failure=NOW - ago)
    decision = decide(demand, supply, how, NOW)
    usual = decide(demand, without_failures(supply), how, NOW).submit
    due = supply.last_failure + trial_pause(failures, how.max_failures) <= NOW
    assert not decision.gives_up
    assert decision.submit == (min(1, usual) if due and not supply.pending else 0)
    assert not (decision.goes_on and decision.submit)


def test_a_pool_that_stays_broken_is_tried_ever_less_and_one_that_is_mended_is_used_again() -> None:
    how = PolicySettings(target=Target(maximum=100), max_failures=3)
    demand = Demand(queued=12, in_hand={f"w{n}": 1 for n in range(4)})
    trials, failures, last = [], 3, 0.0
    for now in range(4 * 3600):
        decision = decide(demand, four_busy(failures=failures, last_failure=last), how, now)
        if decision.submit:
            assert decision.submit == 1
            trials.append(now - last)
            failures, last = failures + 1, now
    assert trials[:6] == [60, 120, 240, 480, 960, 960] and set(trials[6:]) == {960}
    assert decide(demand, four_busy(), how, last + 1).submit == 12, "one has joined"


def test_a_spent_failure_budget_is_told_though_others_work() -> None:
    how = PolicySettings(target=Target(maximum=100), max_failures=3)
    demand = Demand(queued=12, in_hand={f"w{n}": 1 for n in range(4)})
    decision = decide(demand, four_busy(failures=4, last_failure=NOW - 119), how, NOW)
    assert (decision.submit, decision.gives_up) == (0, "")
    assert decision.goes_on == (
        "4 workers in a row ended before they joined the scheduler: though 16 are wanted, the work goes on with 4; "
        "one is tried after 120 s"
    )
    trial = decide(demand, four_busy(failures=4, last_failure=NOW - 120), how, NOW)
    assert trial.reason == "12 queued, 4 running, 0 pending: +1 (a trial after 4 failures)"
    assert not decide(demand, four_busy(failures=2, last_failure=NOW - 1e6), how, NOW).goes_on
    starting = Supply(pending=("1.0",), failures=3, last_failure=NOW - 1e6)
    assert not decide(demand, starting, how, NOW).goes_on, "it may yet join"


@given(situations(), adapting)
def test_jobs_in_the_queue_stay_below_their_cap(situation: tuple[Demand, Supply], how: PolicySettings) -> None:
    demand, supply = situation
    decision = decide(demand, supply, how, NOW)
    assert not decision.submit or supply.unstarted + decision.submit <= how.max_idle_jobs


def test_the_cap_is_told_where_it_binds() -> None:
    how = PolicySettings(target=Target(maximum=100), group="cpu", max_idle_jobs=50)
    decision = decide(Demand(queued=80), Supply(), how, NOW)
    assert decision.reason == "80 queued, 0 running, 0 pending: +50 cpu (adaptive.max_idle_jobs)"
    decision = decide(Demand(queued=12, in_hand={f"w{n}": 1 for n in range(4)}), four_busy(), how, NOW)
    assert decision.reason == "12 queued, 4 running, 0 pending: +12 cpu"


def test_a_number_that_the_user_asked_for_is_told_as_such() -> None:
    how = PolicySettings(target=Target(fixed=2), group="cpu")
    assert decide(Demand(), Supply(), how, NOW).reason == "scale(2): 0 queued, 0 running, 0 pending: +2 cpu"
    assert decide(Demand(), four_busy(), how, NOW).reason == "scale(2): 0 queued, 4 running, 0 pending: -2 cpu"
    how = dataclasses.replace(how, target=Target(minimum=3, maximum=9))
    assert decide(Demand(queued=2), Supply(), how, NOW).reason == "minimum 3: 2 queued, 0 running, 0 pending: +3 cpu"
    assert decide(Demand(queued=3), Supply(), how, NOW).reason == "3 queued, 0 running, 0 pending: +3 cpu"


def four_busy(**more: object) -> Supply:
    return dataclasses.replace(Supply(busy=tuple(f"w{n}" for n in range(4))), **more)  # type: ignore[arg-type]


def test_queued_tasks_keep_idle_workers() -> None:
    supply = Supply(idle={"a": NOW - 99.0, "b": NOW - 99.0}, pending=("1.0",))
    how = PolicySettings(target=Target(maximum=9), residence=1)
    assert not decide(Demand(queued=1), supply, how, NOW).changes


def test_a_task_in_hand_wants_its_thread() -> None:
    how = PolicySettings(target=Target(maximum=100), threads=2)
    assert wanted_workers(Demand(queued=3, in_hand={"a": 5}), Supply(busy=("a",)), how) == 4


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
