"""``python -m benchmarks.adaptive_sim.picture FILE.png``: one flow in the simulation, and why it was decided so."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from prefect_htcdask.supervisor.policy import Decision

from .ours import Ours, ours
from .pool import WAITING
from .simulation import Simulation
from .state import GroupState, Orders
from .stock import Stock
from .trace import Group, Pool, Trace
from .traces import lognormal

SEED = 2

QUEUED, BUSY, IDLE, JOINING, WAITS, STOCK = "#c8ccd2", "#2a6f97", "#a9d6e5", "#f4a259", "#f8dcae", "#b23a48"


@dataclass
class Sample:
    """What there was at a time."""

    at: float
    queued: int
    busy: int
    idle: int
    joining: int
    waiting: int


@dataclass
class Told:
    """One run: samples, and the decisions that changed something."""

    samples: list[Sample] = field(default_factory=list)
    decisions: list[tuple[float, Decision]] = field(default_factory=list)


class Recorded(Ours):
    """Our policy, with its decisions written down."""

    def __init__(self, group: Group, told: Told) -> None:
        super().__init__(ours(group).settings)
        self.told = told

    def decide(self, state: GroupState, now: float) -> Decision:
        """The decision."""
        decision = super().decide(state, now)
        if decision.changes:
            self.told.decisions.append((now, decision))
        return decision


class Watched:
    """A policy whose group is sampled at every look."""

    def __init__(self, policy: Any, told: Told) -> None:
        self.policy, self.told = policy, told

    def look(self, state: GroupState, now: float) -> Orders:
        """Sample, then leave it to the policy."""
        waiting = sum(job.state == WAITING for job in state.pending.values())
        sample = Sample(
            now, len(state.queue), len(state.in_hand), len(state.idle), len(state.pending) - waiting, waiting
        )
        self.told.samples.append(sample)
        orders: Orders = self.policy.look(state, now)
        return Orders(orders.submit, orders.remove, now + 1)


def small() -> Trace:
    """A burst whose results are merged and fitted, a pause, a second wave."""
    random = Random("picture")
    trace = Trace("picture", (Group(maximum=40, wait_median=40, wait_sigma=0.5),), pool=Pool(eviction_rate=0))
    reads = trace.add("read", lognormal(random, 60, 0.35, 160))
    merge = trace.add("merge", [130.0])[0]
    for read in reads:
        trace.after(read, merge)
    for fit in trace.add("fit", lognormal(random, 70, 0.3, 60)):
        trace.after(merge, fit)
    trace.submit(0)
    first = trace.tasks
    trace.add("read", lognormal(random, 60, 0.35, 70))
    trace.submit(first, pause=150)
    return trace


def run(policy: Callable[[Group, Told], Any]) -> Told:
    """One run under a policy."""
    told = Told()
    simulation = Simulation(small(), lambda group: Watched(policy(group, told), told), SEED)
    outcome = simulation.run()
    told.samples.append(Sample(outcome.makespan, 0, 0, 0, 0, 0))
    return told


def draw(path: str) -> None:
    """Draw it."""
    mine = run(Recorded)
    stock = run(lambda group, told: Stock(group))
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False})
    figure, (tasks, workers) = plt.subplots(
        2, 1, sharex=True, figsize=(10.5, 6.4), height_ratios=(1, 2.2), layout="constrained"
    )
    at = [sample.at / 60 for sample in mine.samples]
    tasks.fill_between(at, [sample.queued for sample in mine.samples], step="post", color=QUEUED)
    tasks.set_ylabel("queued tasks")
    layers = {
        "busy workers": (BUSY, [sample.busy for sample in mine.samples]),
        "idle workers": (IDLE, [sample.idle for sample in mine.samples]),
        "starting": (JOINING, [sample.joining for sample in mine.samples]),
        "waiting in HTCondor's queue": (WAITS, [sample.waiting for sample in mine.samples]),
    }
    base = [0] * len(at)
    for label, (colour, counts) in layers.items():
        top = [below + count for below, count in zip(base, counts, strict=True)]
        workers.fill_between(at, base, top, step="post", color=colour, label=label, linewidth=0)
        base = top
    joined = [sample.busy + sample.idle for sample in stock.samples]
    workers.step(
        [sample.at / 60 for sample in stock.samples],
        joined,
        where="post",
        color=STOCK,
        linewidth=1.1,
        label="stock Adaptive: its workers",
    )
    workers.set_ylabel("worker jobs (maximum 40)")
    workers.set_xlabel("minutes since the flow began")
    workers.set_ylim(0, 67)
    workers.set_yticks([0, 10, 20, 30, 40])
    ends = at[-1], stock.samples[-1].at / 60
    workers.set_xlim(0, max(ends) + 0.9)
    workers.set_xticks(range(0, math.ceil(max(ends)) + 1, 2))
    for end, whose, colour in zip(ends, ("ours", "stock"), (BUSY, STOCK), strict=True):
        workers.annotate(
            f"{whose} ends\n{end:.1f} min",
            xy=(end, 0),
            xytext=(end, 6.5),
            fontsize=8,
            color=colour,
            ha="center",
            arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 0.8},
        )
    workers.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=5, frameon=False)
    annotate(workers, mine)
    for axis in (tasks, workers):
        axis.spines["right"].set_visible(False)
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.6)
        axis.set_axisbelow(True)
    figure.suptitle("How many workers, and why: one flow, simulated", fontsize=12, x=0.01, ha="left")
    figure.savefig(path, dpi=120)


def annotate(axis: Any, told: Told) -> None:
    """The reasons, as the flow run's log has them, where they were decided."""
    grows = [(now, decision) for now, decision in told.decisions if decision.submit]
    ahead = [(now, decision) for now, decision in grows if "ready within" in decision.reason]
    burst, wave = grows[0], max(grows, key=lambda pair: pair[0] if pair[1].submit > 5 else -1.0)
    leaves = next((now, decision) for now, decision in told.decisions if len(decision.retire) > 1)
    notes = [
        (burst, "a burst: all of it in one decision"),
        (leaves, "more workers than tasks: the idle leave\nafter a few seconds, the busy stay"),
        (
            ahead[0],
            "the merge is expected to end within the time a worker\ntakes to come: asked for before there is a task",
        ),
        (wave, "the next wave"),
    ]
    for number, ((now, decision), words) in enumerate(notes):
        axis.annotate(
            f"{words}\n“{decision.reason}”",
            xy=(now / 60, 41),
            xytext=(now / 60 + 0.12, 55 if number == 1 else 45),
            fontsize=7.5,
            va="bottom",
            arrowprops={"arrowstyle": "-", "color": "#555555", "linewidth": 0.8, "relpos": (0, 0)},
        )


if __name__ == "__main__":
    draw(sys.argv[1])
