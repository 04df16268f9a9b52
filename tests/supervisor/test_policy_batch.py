"""What the policy knows of a batch queue: how long jobs wait, how long tasks take, which are about to be ready."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_htcdask.supervisor.policy import (
    FIRST_WAIT,
    RECENT_WAITS,
    Demand,
    PolicySettings,
    Supply,
    Target,
    decide,
    useful_pending,
    wanted_workers,
)

NOW = 1000.0
HOW = PolicySettings(target=Target(maximum=100), group="cpu")


def busy(count: int, **more: object) -> Supply:
    return dataclasses.replace(Supply(busy=tuple(f"w{n}" for n in range(count))), **more)  # type: ignore[arg-type]


def in_hand(count: int, each: int = 1) -> dict[str, int]:
    return {f"w{n}": each for n in range(count)}


def test_the_arrival_is_learned_from_the_latest_waits() -> None:
    assert Supply(boot=7).arrival == FIRST_WAIT + 7
    assert Supply(waits=[30.0], boot=7).arrival == 37
    # One in four is as quick; those of long ago are forgotten.
    assert Supply(waits=[1000.0] * 200 + [float(wait) for wait in range(RECENT_WAITS)], boot=0).arrival == 12


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=80), st.floats(0, 100))
def test_the_arrival_is_one_that_was_seen(waits: list[float], boot: float) -> None:
    supply = Supply(waits=waits, boot=boot)
    assert supply.arrival - boot == pytest.approx(min(waits, key=lambda wait: abs(wait + boot - supply.arrival)))
    assert sum(wait + boot <= supply.arrival for wait in waits[-RECENT_WAITS:]) * 4 >= min(len(waits), RECENT_WAITS)


def test_tasks_that_will_be_ready_when_a_worker_joins_are_asked_for_now() -> None:
    demand = Demand(in_hand=in_hand(10), coming={10.0: 5, 80.0: 20, 200.0: 40}, task_seconds=1e5, work=1e6)
    supply = busy(10, waits=[75.0], boot=10)
    decision = decide(demand, supply, HOW, NOW)
    assert decision.submit == 25
    assert decision.reason == "0 queued, 25 ready within 85 s, 10 running, 0 pending: +25 cpu"
    assert decide(demand, busy(10, waits=[400.0], boot=10), HOW, NOW).submit == 65
    assert not decide(demand, busy(10, waits=[0.0], boot=5), HOW, NOW).submit


def test_workers_are_held_for_the_tasks_that_will_be_ready_sooner_than_others_could_join() -> None:
    idle = {f"i{n}": NOW - 500 for n in range(10)}
    supply = busy(1, idle=idle, waits=[75.0], boot=10)
    demand = Demand(in_hand=in_hand(1), coming={60.0: 8})
    assert len(decide(demand, supply, HOW, NOW).retire) == 2
    far = dataclasses.replace(demand, coming={90.0: 8})
    assert len(decide(far, supply, HOW, NOW).retire) == 10


def test_a_late_task_holds_its_worker_until_another_would_come_as_soon() -> None:
    supply = busy(1, idle={"i": NOW - 500}, waits=[30.0], boot=5)
    assert not decide(Demand(in_hand=in_hand(1), coming={-30.0: 1}), supply, HOW, NOW).changes
    assert decide(Demand(in_hand=in_hand(1), coming={-40.0: 1}), supply, HOW, NOW).retire == ("i",)
    pending = busy(1, pending=("1.0",), unstarted=1, waits=[30.0], boot=5)
    assert decide(Demand(in_hand=in_hand(1), coming={-40.0: 1}), pending, HOW, NOW).remove_pending == ("1.0",)


def test_quick_starts_do_not_drop_the_jobs_that_follow_them() -> None:
    # Forty are asked for a minute ahead. The first start after 20 s, sooner than any before: now half a minute would
    # do for a new one, but the others are not dropped to be asked for again in a moment.
    how = dataclasses.replace(HOW, target=Target(maximum=100))
    demand = Demand(in_hand=in_hand(1), coming={60.0: 40}, task_seconds=60, work=60)
    assert decide(demand, busy(1, waits=[55.0] * 10, boot=10), how, NOW).submit == 40
    pending = tuple(f"1.{n}" for n in range(40))
    learned = busy(1, waits=[55.0] * 10 + [20.0] * 20, boot=10, pending=pending, unstarted=20)
    later = dataclasses.replace(demand, coming={40.0: 40})
    assert not decide(later, learned, how, NOW + 20).changes
    # Nor does an idle worker go while pending ones, which ought to go first, stay.
    decision = decide(later, dataclasses.replace(learned, idle={"i": NOW - 500}), how, NOW + 20)
    assert (decision.remove_pending, decision.retire) == (("1.39",), ())
    # What is farther than that is asked for again in time.
    assert len(decide(demand, learned, how, NOW + 20).remove_pending) == 0
    far = dataclasses.replace(demand, coming={70.0: 40})
    assert len(decide(far, learned, how, NOW + 20).remove_pending) == 40


def test_workers_that_would_come_after_the_work_is_done_are_not_asked_for() -> None:
    # 40 one-second tasks with 4 at work are done in 11 s; a worker takes 70 s.
    demand = Demand(queued=40, in_hand=in_hand(4), task_seconds=1, work=44)
    supply = busy(4, waits=[60.0], boot=10)
    assert not decide(demand, supply, HOW, NOW).changes
    # Where one comes in a moment, those are asked for that still find one of the 44 - 4 * 3.
    assert decide(demand, busy(4, waits=[1.0], boot=2), HOW, NOW).submit == 32
    pending = tuple(f"1.{n}" for n in range(30))
    assert decide(demand, busy(4, waits=[1.0], boot=2, pending=pending, unstarted=30), HOW, NOW).submit == 2
    # Long ones wait still.
    assert decide(dataclasses.replace(demand, task_seconds=600, work=26400), supply, HOW, NOW).submit == 40


def test_the_mean_is_that_of_the_tasks_there_are_not_of_all_that_were() -> None:
    # Ten thousand short ones have ended; the ones there are now are long.
    demand = Demand(queued=40, in_hand=in_hand(4), task_seconds=1.0, work=44 * 600.0)
    assert decide(demand, busy(4, waits=[60.0]), HOW, NOW).submit == 40


def test_tasks_of_a_new_kind_may_be_long() -> None:
    # Short ones have ended, but of what is queued nobody knows.
    demand = Demand(queued=40, in_hand=in_hand(4), task_seconds=1.0, work=44.0, unknown=44)
    assert decide(demand, busy(4, waits=[60.0]), HOW, NOW).submit == 40
    some = dataclasses.replace(demand, unknown=10)
    assert decide(some, busy(4, waits=[60.0]), HOW, NOW).submit == 10


def test_pending_jobs_are_kept_though_their_use_is_in_doubt() -> None:
    # Who has waited in the queue for a while is nearer to a slot than the arithmetic knows.
    demand = Demand(queued=40, in_hand=in_hand(4), task_seconds=1, work=44)
    supply = busy(4, waits=[60.0], pending=("1.0", "1.1", "1.2"), unstarted=3)
    assert not decide(demand, supply, HOW, NOW).changes


@given(st.integers(0, 500), st.integers(0, 50), st.floats(0.1, 1000), st.floats(0, 500), st.integers(1, 8))
def test_what_is_asked_for_finds_work(queued: int, workers: int, seconds: float, wait: float, threads: int) -> None:
    how = dataclasses.replace(HOW, threads=threads, target=Target(maximum=1000))
    demand = Demand(
        queued, in_hand(workers, threads), task_seconds=seconds, work=(queued + workers * threads) * seconds
    )
    supply = busy(workers, waits=[wait], boot=10)
    submit = decide(demand, supply, how, NOW).submit
    left = queued + workers * threads - threads * workers * (wait + 10) / seconds
    assert (submit - 1) * threads < max(0.0, left) + 1e-6 or not submit
    if queued and left > 1e-6:
        assert submit
    assert submit <= useful_pending(demand, supply, how)


def test_tasks_that_pile_up_on_a_worker_are_demand() -> None:
    # Tasks with resources are never queued: ten of two threads' worth are with the first worker that came.
    how = dataclasses.replace(HOW, threads=2)
    demand = Demand(in_hand={"w0": 10}, stacked=8, work=36000.0)
    assert decide(demand, busy(1), how, NOW).submit == 4


def test_tasks_that_pile_up_keep_idle_workers_as_queued_ones_do() -> None:
    # Dask will move them over in a moment.
    how = dataclasses.replace(HOW, threads=2)
    supply = busy(1, idle={f"i{n}": NOW - 500 for n in range(4)})
    assert not decide(Demand(in_hand={"w0": 5}, stacked=3), supply, how, NOW).changes
    assert len(decide(Demand(in_hand={"w0": 2}), supply, how, NOW).retire) == 4


@pytest.mark.parametrize("workers", range(1, 10))
def test_tasks_that_wait_beside_free_threads_want_something_else(workers: int) -> None:
    # Ten tasks that want the one GPU of a worker with four threads: ten workers, however many have joined.
    tasks = {f"w{n}": 1 + (n < 10 % workers) + (10 // workers - 1) for n in range(workers)}
    demand = Demand(in_hand=tasks, stacked=10 - workers, work=36e4)
    how = dataclasses.replace(HOW, threads=4)
    assert wanted_workers(demand, busy(workers), how) == 10
    assert decide(demand, busy(workers), how, NOW).submit == 10 - workers


def test_a_worker_with_more_tasks_than_threads_is_no_sign_of_that() -> None:
    # Dask gives a worker one task more than it has threads.
    how = dataclasses.replace(HOW, threads=4)
    assert wanted_workers(Demand(queued=7, in_hand={"w0": 5}, stacked=1), busy(1), how) == 3
