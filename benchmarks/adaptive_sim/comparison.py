"""All traces under all policies, and what comes of it."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from statistics import fmean, stdev

from benchmarks.result import Result

from .bounds import makespan_floor, worker_seconds_floor
from .cost import decision_seconds
from .fixed import fixed
from .ours import ours
from .simulation import Outcome, simulate
from .state import Policy
from .stock import Stock
from .traces import TRACES, make

SEEDS = 40
"""Each trace runs so many times, for one eviction near the end can double a makespan."""

SEEDS_OF = {"million": 2, "evicted": 120}
"""But the one that is long, and large enough to be its own mean, and the one that most depends on luck."""

MAKESPAN_GOAL = 1.15
WORKER_SECONDS_GOAL = 1.25
WORSE_GOAL = 1.05
DECISION_GOAL = 0.05

PEERS: dict[str, Policy] = {"fixed": fixed, "stock_adaptive": Stock}
POLICIES: dict[str, Policy] = {"ours": ours, **PEERS}


@dataclass(frozen=True)
class Score:
    """One policy's figures on one trace, means of its seeds.

    Attributes:
        makespan: over that of a pool with all `maximum` workers asked for at time zero.
        worker_seconds: over those of the tasks alone.
        makespan_over_floor: over what no order of the tasks can beat.
        busy_removed: workers removed with tasks in hand, in all seeds.
        seconds: the makespan itself.
        products: makespan by worker-seconds, both over their bounds, of each seed.
    """

    makespan: float
    worker_seconds: float
    makespan_over_floor: float
    busy_removed: int
    seconds: float
    products: tuple[float, ...] = ()

    @property
    def product(self) -> float:
        """Of the two."""
        return self.makespan * self.worker_seconds

    @property
    def product_error(self) -> float | None:
        """Standard error of the product; `None` where there is but one seed."""
        relative = standard_error([math.log(product) for product in self.products])
        return None if relative is None else self.product * relative

    def figures(self) -> dict[str, float | None]:
        """For the result."""
        return {
            "makespan_s": round(self.seconds, 1),
            "makespan_over_bound": round(self.makespan, 4),
            "makespan_over_floor": round(self.makespan_over_floor, 4),
            "worker_seconds_over_bound": round(self.worker_seconds, 4),
            "product": round(self.product, 4),
            "product_standard_error": _rounded_or_none(self.product_error),
            "seeds": len(self.products),
            "busy_workers_removed": self.busy_removed,
        }


def run() -> Result:
    """Simulate, and compare ours with the peers."""
    scores: dict[str, dict[str, Score]] = {}
    # A fresh interpreter each: what this process has open is none of theirs.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        # The long ones first.
        for name in reversed(TRACES):
            scores[name] = score_trace(name, range(SEEDS_OF.get(name, SEEDS)), pool)
            for policy, score in scores[name].items():
                error = math.nan if score.product_error is None else score.product_error
                print(
                    f"  {name:10} {policy:14} makespan {score.makespan:.3f}, worker-seconds "
                    f"{score.worker_seconds:.3f}, product {score.product:.3f} ± {error:.3f}, "
                    f"busy workers removed {score.busy_removed}",
                    file=sys.stderr,
                )
    return judge({name: scores[name] for name in TRACES}, decision_seconds())


def score_trace(name: str, seeds: Sequence[int], pool: ProcessPoolExecutor) -> dict[str, Score]:
    """Every policy's score on a trace."""
    parts = list(pool.map(score_seed, repeat(name), seeds))
    return {policy: mean_score([part[policy] for part in parts]) for policy in POLICIES}


def score_seed(name: str, seed: int) -> dict[str, Score]:
    """Every policy's score on a trace with one seed; `fixed` is the yardstick of makespans."""
    trace = make(name, seed)
    floor, alone = makespan_floor(trace, seed), worker_seconds_floor(trace)
    outcomes = {policy: simulate(trace, decides, seed) for policy, decides in POLICIES.items()}
    bound = outcomes["fixed"].makespan
    return {policy: _score(outcome, bound, alone, floor) for policy, outcome in outcomes.items()}


def _score(outcome: Outcome, bound: float, alone: float, floor: float) -> Score:
    return Score(
        makespan=outcome.makespan / bound,
        worker_seconds=outcome.worker_seconds / alone,
        makespan_over_floor=outcome.makespan / floor,
        busy_removed=outcome.busy_removed,
        seconds=outcome.makespan,
    )


def mean_score(scores: Sequence[Score]) -> Score:
    """The mean of the seeds."""
    return Score(
        makespan=geometric_mean(score.makespan for score in scores),
        worker_seconds=geometric_mean(score.worker_seconds for score in scores),
        makespan_over_floor=geometric_mean(score.makespan_over_floor for score in scores),
        busy_removed=sum(score.busy_removed for score in scores),
        seconds=fmean(score.seconds for score in scores),
        products=tuple(score.product for score in scores),
    )


def geometric_mean(values: Iterable[float]) -> float:
    """Of ratios, as the geometric mean is the one that does not depend on which is over which."""
    return math.exp(fmean(math.log(value) for value in values))


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of independent values; `None` where it cannot be told."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def ratio_of_products(scores: Mapping[str, Mapping[str, Score]], peer: str) -> tuple[float, float]:
    """Geometric mean over the traces of our product over a peer's, and its standard error.

    All policies meet the same tasks and the same pool in each seed, so that the ratio varies less than the products.
    """
    means, errors = [], []
    for by_policy in scores.values():
        pairs = zip(by_policy["ours"].products, by_policy[peer].products, strict=True)
        logs = [math.log(mine / its) for mine, its in pairs]
        means.append(fmean(logs))
        errors.append(standard_error(logs) or 0.0)
    ratio = math.exp(fmean(means))
    return ratio, ratio * math.hypot(*errors) / len(errors)


def judge(scores: Mapping[str, Mapping[str, Score]], decision: float) -> Result:
    """Figures and checks.

    Args:
        scores: by trace, then by policy.
        decision: seconds of one decision.
    """
    means = {
        policy: {
            "makespan": geometric_mean(by_policy[policy].makespan for by_policy in scores.values()),
            "worker_seconds": geometric_mean(by_policy[policy].worker_seconds for by_policy in scores.values()),
            "product": geometric_mean(by_policy[policy].product for by_policy in scores.values()),
        }
        for policy in ("ours", *PEERS)
    }
    worse = {
        name: by_policy["ours"].product / min(by_policy[peer].product for peer in PEERS)
        for name, by_policy in scores.items()
    }
    worst = max(worse, key=lambda name: worse[name])
    busy_removed = sum(by_policy["ours"].busy_removed for by_policy in scores.values())
    return Result(
        benchmark="adaptive-sim",
        metrics={
            **_rounded(means["ours"]),
            "busy_workers_removed": busy_removed,
            "worst_trace": worst,
            "worst_over_better_peer": round(worse[worst], 4),
            "decision_s": round(decision, 5),
            "product_over": {
                peer: dict(
                    zip(
                        ("ratio", "standard_error"), (round(x, 4) for x in ratio_of_products(scores, peer)), strict=True
                    )
                )
                for peer in PEERS
            },
            "traces": {
                name: {**by_policy["ours"].figures(), "product_over_better_peer": round(worse[name], 4)}
                for name, by_policy in scores.items()
            },
        },
        peers={
            peer: {
                **_rounded(means[peer]),
                "busy_workers_removed": sum(by_policy[peer].busy_removed for by_policy in scores.values()),
                "traces": {name: by_policy[peer].figures() for name, by_policy in scores.items()},
            }
            for peer in PEERS
        },
        goal={
            "makespan_over_bound_at_most": MAKESPAN_GOAL,
            "worker_seconds_over_bound_at_most": WORKER_SECONDS_GOAL,
            "product_below_each_peer": True,
            "worst_over_better_peer_at_most": WORSE_GOAL,
            "busy_workers_removed_at_most": 0,
            "decision_s_below": DECISION_GOAL,
        },
        checks={
            "makespan": means["ours"]["makespan"] <= MAKESPAN_GOAL,
            "worker_seconds": means["ours"]["worker_seconds"] <= WORKER_SECONDS_GOAL,
            "product": all(means["ours"]["product"] < means[peer]["product"] for peer in PEERS),
            "worst_over_better_peer": worse[worst] <= WORSE_GOAL,
            "busy_workers_removed": busy_removed == 0,
            "decision_s": decision < DECISION_GOAL,
        },
    )


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {f"{name}_over_bound" if name != "product" else name: round(value, 4) for name, value in figures.items()}


def _rounded_or_none(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
