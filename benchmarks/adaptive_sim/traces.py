"""The traces: what batch analyses look like, with tasks of tens of seconds to minutes.

Durations are lognormal about a median: most tasks of a kind are alike, some take several times as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

from .trace import Group, Pool, Trace, Wave


def lognormal(random: Random, median: float, sigma: float, count: int) -> list[float]:
    """Durations in seconds."""
    mu = math.log(median)
    return [random.lognormvariate(mu, sigma) for _ in range(count)]


def burst(random: Random) -> Trace:
    """Many like tasks, all at once: a map over a thousand files, a few per worker."""
    trace = Trace("burst", groups=(Group(maximum=200),))
    trace.add("read", lognormal(random, 150, 0.5, 1000))
    trace.submit(0)
    return trace


def ramp(random: Random) -> Trace:
    """Tasks come at a rate that rises over an hour, as data arrive; they never fill the maximum for long."""
    trace = Trace("ramp", groups=(Group(maximum=200),))
    releases = []
    hour, step = 3600.0, 10
    for offset in range(0, int(hour), step):
        count = round(1.4 * step * (offset + step) / hour)
        if count:
            tasks = trace.add("calibrate", lognormal(random, 100, 0.5, count))
            releases.append((float(offset), tasks.start, tasks.stop))
    first = releases[0][0]
    trace.waves.append(Wave(tuple((offset - first, start, end) for offset, start, end in releases)))
    return trace


def stragglers(random: Random) -> Trace:
    """A map in which a few tasks take ten times as long, wherever in the queue they are."""
    trace = Trace("stragglers", groups=(Group(maximum=150),))
    short, long = lognormal(random, 60, 0.4, 2940), lognormal(random, 700, 0.25, 60)
    durations = short + long
    random.shuffle(durations)
    trace.add("fit", durations)
    trace.submit(0)
    return trace


def dag(random: Random) -> Trace:
    """Fan-out and fan-in, twice: files to datasets to one result, then its systematic variations to one plot."""
    trace = Trace("dag", groups=(Group(maximum=150),))
    merges = []
    for _ in range(12):
        skims = trace.add("skim", lognormal(random, 80, 0.5, 100))
        merge = trace.add("merge", lognormal(random, 60, 0.3, 1))[0]
        for skim in skims:
            trace.after(skim, merge)
        merges.append(merge)
    model = trace.add("model", lognormal(random, 60, 0.2, 1))[0]
    for merge in merges:
        trace.after(merge, model)
    variations = trace.add("variation", lognormal(random, 120, 0.4, 500))
    limit = trace.add("limit", lognormal(random, 60, 0.2, 1))[0]
    for variation in variations:
        trace.after(model, variation)
        trace.after(variation, limit)
    trace.submit(0)
    return trace


def waves(random: Random) -> Trace:
    """A user who waits for results, looks at them, and submits again: short pauses and long ones."""
    trace = Trace("waves", groups=(Group(maximum=100),))
    for number, pause in enumerate((0, 20, 300, 60, 900)):
        first = trace.tasks
        trace.add(f"scan{number % 2}", lognormal(random, 75, 0.5, 600))
        trace.submit(first, float(pause))
    return trace


def mixed(random: Random) -> Trace:
    """Three worker groups: preparation on cpu, training on gpu, sums in much memory; each step needs the one before."""
    groups = (
        Group("cpu", threads=4, maximum=50),
        Group("gpu", maximum=20, capacity=16, wait_median=150),
        Group("highmem", maximum=10, wait_median=90),
    )
    trace = Trace("mixed", groups=groups)
    for _ in range(60):
        prepared = trace.add("prepare", lognormal(random, 90, 0.5, 60), "cpu")
        trained = trace.add("train", lognormal(random, 420, 0.3, 2), "gpu")
        summed = trace.add("sum", lognormal(random, 240, 0.4, 1), "highmem")[0]
        for train in trained:
            for prepare in prepared:
                trace.after(prepare, train)
            trace.after(train, summed)
    trace.submit(0)
    return trace


def evicted(random: Random) -> Trace:
    """Two maps, the second of the first's results, on slots that others take back every half an hour."""
    trace = Trace("evicted", groups=(Group(maximum=120),), pool=Pool(eviction_rate=2.0))
    for read in trace.add("read", lognormal(random, 100, 0.5, 900)):
        fit = trace.add("fit", lognormal(random, 90, 0.4, 1))[0]
        trace.after(read, fit)
    trace.submit(0)
    return trace


def slow(random: Random) -> Trace:
    """Selection, then histograms, then fits, each of the results before, in a pool where jobs wait for six minutes."""
    trace = Trace("slow", groups=(Group(maximum=100, wait_median=360),))
    selected = trace.add("select", lognormal(random, 240, 0.5, 400))
    fits = []
    for number in range(20):
        histogram = trace.add("histogram", lognormal(random, 120, 0.3, 1))[0]
        for task in selected[number * 20 : (number + 1) * 20]:
            trace.after(task, histogram)
        for fit in trace.add("fit", lognormal(random, 300, 0.4, 10)):
            trace.after(histogram, fit)
            fits.append(fit)
    table = trace.add("table", lognormal(random, 30, 0.2, 1))[0]
    for fit in fits:
        trace.after(fit, table)
    trace.submit(0)
    return trace


def quick(random: Random) -> Trace:
    """Short tasks in bursts, each once the results of the one before are there, in a pool that starts jobs at once."""
    trace = Trace("quick", groups=(Group(maximum=60, wait_median=2),), pool=Pool(cycle=5.0, boot=4.0))
    for pause in (0, 5, 40, 10, 120, 5):
        first = trace.tasks
        trace.add("toy", lognormal(random, 10, 0.6, 500))
        trace.submit(first, float(pause))
    return trace


def million(random: Random) -> Trace:
    """A million tasks on up to 10,000 workers."""
    trace = Trace("million", groups=(Group(maximum=10_000),))
    trace.add("simulate", lognormal(random, 45, 0.5, 1_000_000))
    trace.submit(0)
    return trace


TRACES: dict[str, Callable[[Random], Trace]] = {
    make.__name__: make for make in (burst, ramp, stragglers, dag, waves, mixed, evicted, slow, quick, million)
}


def make(name: str, seed: int) -> Trace:
    """The trace of this name, the same for the same seed."""
    return TRACES[name](Random(f"{name}/{seed}"))
