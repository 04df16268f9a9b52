"""Adaptive scaling on a real pool: three shortened traces, ours against HTCondorCluster.adapt() and a fixed cluster.

The pool is the embedded one, whose jobs would start at once: all jobs of all three ask to wait in the queue for
`QUEUE_WAIT` seconds first. Tasks sleep, so that the machine's few cores do not decide. Worker-seconds are what
condor_history says of the jobs.
"""

from __future__ import annotations

import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from distributed import Client, Future, wait

from benchmarks.adaptive_sim.bounds import worker_seconds_floor
from benchmarks.adaptive_sim.comparison import geometric_mean
from benchmarks.adaptive_sim.trace import Group, Trace
from benchmarks.adaptive_sim.traces import lognormal
from benchmarks.parts import QueueWatch, pool
from benchmarks.result import Result

MAXIMUM = 8
QUEUE_WAIT = 5
SEED = 1
TIMEOUT = 600.0
MEMORY, DISK = "300 MiB", "100 MiB"
REQUIREMENTS = f"(time() - MY.QDate) >= {QUEUE_WAIT}"

MAKESPAN_GOAL = 1.15
WORKER_SECONDS_GOAL = 1.25
WORSE_GOAL = 1.05


def burst(random: Random) -> Trace:
    """Forty like tasks at once, five for each worker."""
    trace = Trace("burst", groups=(Group(maximum=MAXIMUM),))
    trace.add("read", lognormal(random, 15, 0.5, 40))
    trace.submit(0)
    return trace


def dag(random: Random) -> Trace:
    """Fan-in, one task, fan-out, fan-in: most workers have nothing to do in the middle."""
    trace = Trace("dag", groups=(Group(maximum=MAXIMUM),))
    model_inputs = []
    for _ in range(4):
        skims = trace.add("skim", lognormal(random, 10, 0.5, 10))
        merge = trace.add("merge", lognormal(random, 6, 0.3, 1))[0]
        for skim in skims:
            trace.after(skim, merge)
        model_inputs.append(merge)
    model = trace.add("model", [15.0])[0]
    for merge in model_inputs:
        trace.after(merge, model)
    variations = trace.add("variation", lognormal(random, 12, 0.4, 40))
    limit = trace.add("limit", [6.0])[0]
    for variation in variations:
        trace.after(model, variation)
        trace.after(variation, limit)
    trace.submit(0)
    return trace


def waves(random: Random) -> Trace:
    """Three times the same scan, after a short look at the results and after a long one."""
    trace = Trace("waves", groups=(Group(maximum=MAXIMUM),))
    for pause in (0, 2, 30):
        first = trace.tasks
        trace.add("scan", lognormal(random, 7.5, 0.5, 32))
        trace.submit(first, float(pause))
    return trace


TRACES: tuple[Callable[[Random], Trace], ...] = (burst, dag, waves)


@dataclass(frozen=True)
class Score:
    """What one policy made of one trace.

    Attributes:
        makespan: seconds from the first submission to the last result.
        worker_seconds: seconds that its jobs ran in all.
        jobs: how many there were.
        again: tasks that ran more than once.
    """

    makespan: float
    worker_seconds: float
    jobs: int
    again: int


def run() -> Result:
    """Run all traces under all policies, one after the other."""
    policies: dict[str, Callable[[], Any]] = {"fixed": _fixed, "ours": _ours, "HTCondorCluster.adapt": _stock}
    scores: dict[str, dict[str, Score]] = {}
    floors: dict[str, float] = {}
    with pool(slots=2 * MAXIMUM):
        for make in TRACES:
            trace = make(Random(f"{make.__name__}/{SEED}"))
            floors[trace.name] = worker_seconds_floor(trace)
            scores[trace.name] = {}
            for name, cluster in policies.items():
                score = scores[trace.name][name] = _measure(trace, cluster)
                print(
                    f"  {trace.name:6} {name:22} makespan {score.makespan:6.1f} s, worker-seconds "
                    f"{score.worker_seconds:6.0f} of {floors[trace.name]:.0f}, {score.jobs} jobs, "
                    f"{score.again} tasks run again",
                    file=sys.stderr,
                    flush=True,
                )
    return judge(scores, floors)


@contextmanager
def _ours() -> Iterator[tuple[Client, str]]:
    from prefect_htcdask import HTCGatewayCluster
    from prefect_htcdask.condor.submit_description import cluster_constraint, cluster_digest

    with HTCGatewayCluster(memory=MEMORY, disk=DISK, requirements=REQUIREMENTS) as cluster:
        cluster.adapt(minimum=0, maximum=MAXIMUM)
        with cluster.get_client() as client:
            yield client, cluster_constraint(cluster_digest(cluster.name))


@contextmanager
def _fixed() -> Iterator[tuple[Client, str]]:
    from prefect_htcdask import HTCGatewayCluster
    from prefect_htcdask.condor.submit_description import cluster_constraint, cluster_digest

    with (
        HTCGatewayCluster(memory=MEMORY, disk=DISK, requirements=REQUIREMENTS) as cluster,
        cluster.get_client() as client,
    ):
        cluster.scale(MAXIMUM)
        yield client, cluster_constraint(cluster_digest(cluster.name))


@contextmanager
def _stock() -> Iterator[tuple[Client, str]]:
    from dask_jobqueue import HTCondorCluster

    mark = uuid.uuid4().hex
    with HTCondorCluster(
        cores=1,
        memory=MEMORY,
        disk=DISK,
        python=sys.executable,
        job_extra_directives={"requirements": REQUIREMENTS, "MY.BenchmarkRun": f'"{mark}"'},
        scheduler_options={"dashboard_address": None, "host": "127.0.0.1"},
        worker_extra_args=["--host", "127.0.0.1"],
    ) as cluster:
        cluster.adapt(minimum=0, maximum=MAXIMUM)
        with Client(cluster) as client:
            yield client, f'BenchmarkRun == "{mark}"'


def _measure(trace: Trace, cluster: Callable[[], Any]) -> Score:
    with tempfile.TemporaryDirectory(prefix="htcdask-bench-ran-") as directory:
        # The pool's jobs may run as another user.
        Path(directory).chmod(0o777)
        with cluster() as (client, constraint):
            makespan = play(trace, client, directory)
        QueueWatch(constraint, 0, at_most=True, timeout=120).when()
        ran = [path.name.partition(".")[0] for path in Path(directory).iterdir()]
    jobs = _history(constraint)
    return Score(makespan, sum(jobs), len(jobs), len(ran) - len(set(ran)))


def play(trace: Trace, client: Client, directory: str) -> float:
    """Submit a trace as its user does.

    Args:
        trace: the tasks.
        client: of the cluster.
        directory: each run of a task leaves a file there.

    Returns:
        seconds from the first submission to the last result.
    """
    needs: dict[int, list[int]] = {}
    for needed, tasks in trace.dependents.items():
        for task in tasks:
            needs.setdefault(task, []).append(needed)
    futures: dict[int, Future] = {}
    nap = _nap()
    began = time.monotonic()
    for wave in trace.waves:
        time.sleep(wave.pause)
        for _offset, first, end in wave.releases:
            for task in range(first, end):
                kind = trace.kinds[trace.kind_of[task]].name
                inputs = [futures[needed] for needed in needs.get(task, [])]
                futures[task] = client.submit(
                    nap, trace.durations[task], directory, f"{kind}-{task}", inputs, key=f"{kind}-{uuid.uuid4().hex}"
                )
        wait([futures[task] for task in wave.tasks()], timeout=TIMEOUT)
        client.gather([futures[task] for task in wave.tasks()])
    return time.monotonic() - began


def _nap() -> Callable[..., str]:
    """The task. It is no function of this module, which workers have not: so it travels by value."""

    def nap(seconds: float, directory: str, name: str, _inputs: list[Any]) -> str:
        Path(directory, f"{name}.{uuid.uuid4().hex}").touch()
        time.sleep(seconds)
        return name

    return nap


def _history(constraint: str) -> list[float]:
    """Seconds that each job ran."""
    import htcondor2

    ads = htcondor2.Schedd().history(constraint, ["ClusterId", "RemoteWallClockTime"], match=1000)
    return [float(ad.get("RemoteWallClockTime", 0.0)) for ad in ads]


def judge(scores: Mapping[str, Mapping[str, Score]], floors: Mapping[str, float]) -> Result:
    """Figures and checks; `fixed` is the yardstick of makespans, the tasks alone that of worker-seconds."""
    names = list(next(iter(scores.values())))
    makespan = {
        trace: {name: scores[trace][name].makespan / scores[trace]["fixed"].makespan for name in names}
        for trace in scores
    }
    seconds = {trace: {name: scores[trace][name].worker_seconds / floors[trace] for name in names} for trace in scores}
    product = {trace: {name: makespan[trace][name] * seconds[trace][name] for name in names} for trace in scores}

    def figures(name: str) -> dict[str, Any]:
        return {
            "makespan_over_bound": round(geometric_mean(makespan[trace][name] for trace in scores), 3),
            "worker_seconds_over_bound": round(geometric_mean(seconds[trace][name] for trace in scores), 3),
            "product": round(geometric_mean(product[trace][name] for trace in scores), 3),
            "tasks_run_again": sum(scores[trace][name].again for trace in scores),
            "traces": {
                trace: {
                    "makespan_s": round(scores[trace][name].makespan, 1),
                    "worker_seconds_s": round(scores[trace][name].worker_seconds, 1),
                    "makespan_over_bound": round(makespan[trace][name], 3),
                    "worker_seconds_over_bound": round(seconds[trace][name], 3),
                    "product": round(product[trace][name], 3),
                    "jobs": scores[trace][name].jobs,
                    "tasks_run_again": scores[trace][name].again,
                }
                for trace in scores
            },
        }

    ours, peers = figures("ours"), {name: figures(name) for name in names if name != "ours"}
    worse = {
        trace: product[trace]["ours"] / min(product[trace][name] for name in names if name != "ours")
        for trace in scores
    }
    worst = max(worse, key=lambda trace: worse[trace])
    return Result(
        "adaptive-pool",
        metrics={
            **ours,
            "worst_trace": worst,
            "worst_over_better_peer": round(worse[worst], 3),
            "maximum_workers": MAXIMUM,
            "queue_wait_s": QUEUE_WAIT,
        },
        peers=peers,
        goal={
            "makespan_over_bound_at_most": MAKESPAN_GOAL,
            "worker_seconds_over_bound_at_most": WORKER_SECONDS_GOAL,
            "product_below_each_peer": True,
            "worst_over_better_peer_at_most": WORSE_GOAL,
            "tasks_run_again_at_most": 0,
        },
        checks={
            "makespan": ours["makespan_over_bound"] <= MAKESPAN_GOAL,
            "worker_seconds": ours["worker_seconds_over_bound"] <= WORKER_SECONDS_GOAL,
            "product": all(ours["product"] < peer["product"] for peer in peers.values()),
            "worst_over_better_peer": worse[worst] <= WORSE_GOAL,
            "tasks_run_again": ours["tasks_run_again"] == 0,
        },
    )
