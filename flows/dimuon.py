"""The dimuon mass spectrum from CMS NanoAOD, read by Dask workers that are HTCondor jobs.

Run it by::

    python flows/dimuon.py                                # a few real CMS events, fetched once
    python flows/dimuon.py 'data/*.root' root://host//store/file.root --workers 50
"""

from __future__ import annotations

import glob
import io
import json
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import awkward as ak
import hist
import numpy as np
import typer
import uproot
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import TaskRun
from prefect.futures import PrefectFuture
from prefect.states import State
from prefect.tasks import Task

import spectrum as sp
from prefect_htcdask import HTCDaskError, HTCDaskTaskRunner
from prefect_htcdask.embedded.errors import EmbeddedError
from prefect_htcdask.settings import SettingsError
from samples import SamplesError, cms_samples

MUON_MASS = 0.1056583755  # GeV (Particle Data Group, 2024)
BRANCHES = ("Muon_pt", "Muon_eta", "Muon_phi", "Muon_charge")
SHIPPED = 32 * 1024**2
"""Local files of at most this many bytes together travel with the tasks, whose workers then need not see this disk."""
FAN_IN = 8
"""Partial results that one task merges."""

Result = tuple[hist.Hist, hist.Hist]
"""The spectrum and the counts of a part of the events."""


class InputError(ValueError):
    """An input that cannot be analysed, whoever reads it and however often; the message names it."""


class Source(NamedTuple):
    """One input file, as a task needs it to read it on any worker."""

    address: str
    content: bytes | None = None

    @property
    def is_local(self) -> bool:
        return "://" not in self.address


class Contents(NamedTuple):
    """What a file holds."""

    events: int
    dataset: str


def worth_retrying(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Storage fails in passing; an input of the wrong form stays so."""
    failure = state.result(raise_on_failure=False)
    return not isinstance(failure, InputError)


def find_inputs(patterns: list[str]) -> list[Source]:
    """The files that paths, globs and URLs name, each once, in order.

    Raises:
        InputError: for a path or glob that names no file here.
    """
    found: dict[str, Path | None] = {}
    for pattern in patterns:
        if "://" in pattern:
            found[pattern] = None
            continue
        paths = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
        files = [Path(path).resolve() for path in paths if Path(path).is_file()]
        if not files:
            raise InputError(f"input {pattern!r} names no file on {socket.gethostname()}; give a path, a glob or a URL")
        found.update({str(path): path for path in files})
    small = sum(path.stat().st_size for path in found.values() if path) <= SHIPPED
    return [Source(name, path.read_bytes() if path and small else None) for name, path in found.items()]


@contextmanager
def open_events(source: Source, tree: str) -> Iterator[Any]:
    """The event tree of a file, which is closed at the end of the block.

    Raises:
        InputError: where the file is not there, is no ROOT file, or has no such tree with muons.
    """
    if source.content is not None:
        readable: Any = io.BytesIO(source.content)
    elif source.is_local and not Path(source.address).is_file():
        raise InputError(
            f"{source.address} is not visible on {socket.gethostname()}, and the local files are too large to "
            "travel with the tasks; put it on a file system that the workers share, or name it by a URL"
        )
    else:
        readable = source.address
    try:
        file = uproot.open(readable)
    except (ValueError, OSError) as exc:
        # uproot's ValueError tells of content that is not ROOT's; its OSError of a short file, or of failing storage.
        if isinstance(exc, ValueError) or source.content is not None:
            raise InputError(f"{source.address} is no whole ROOT file: {exc}") from exc
        raise
    with file:
        if tree not in file:
            names = ", ".join(sorted(set(file.keys(cycle=False)))) or "nothing"
            raise InputError(f"{source.address} has no tree {tree!r}; it holds {names}")
        events = file[tree]
        missing = ", ".join(name for name in BRANCHES if name not in events)
        if missing:
            raise InputError(f"{source.address}: tree {tree!r} has no {missing}; NanoAOD with muons is needed")
        yield events


@task(retries=2, retry_delay_seconds=[5, 30], retry_condition_fn=worth_retrying, tags=["nanoaod"])
def inspect(source: Source, tree: str) -> Contents:
    """How many events a file holds, and of which data set."""
    with open_events(source, tree) as events:
        kind = "simulation" if "genWeight" in events else "data"
        return Contents(int(events.num_entries), f"{Path(source.address).stem} ({kind})")


@task(retries=2, retry_delay_seconds=[5, 30], retry_condition_fn=worth_retrying, tags=["nanoaod"])
def fill(source: Source, tree: str, dataset: str, start: int, stop: int, min_pt: float, max_eta: float) -> Result:
    """Histogram the opposite-sign pairs of the events from `start` up to `stop`."""
    with open_events(source, tree) as events:
        muons = events.arrays(BRANCHES, entry_start=start, entry_stop=stop)
    return fill_histograms(muons, dataset, min_pt, max_eta)


def fill_histograms(muons: ak.Array, dataset: str, min_pt: float, max_eta: float) -> Result:
    """Spectrum and counts of events with the branches `BRANCHES`; `min_pt` in GeV."""
    first, second = ak.unzip(ak.combinations(ak.zip({name.removeprefix("Muon_"): muons[name] for name in BRANCHES}), 2))
    opposite = first.charge * second.charge < 0
    accepted = opposite
    for muon in (first, second):
        accepted = accepted & (muon.pt >= min_pt) & (np.abs(muon.eta) <= max_eta)
    mass = pair_mass(first[accepted], second[accepted])
    spectrum, counts = sp.new_spectrum(), sp.new_counts()
    spectrum.fill(dataset=dataset, mass=mass)
    passed = (
        len(muons),
        int(ak.sum(ak.num(muons.Muon_pt) >= 2)),
        int(ak.sum(opposite)),
        len(mass),
    )
    for step, number in zip(sp.STEPS, passed, strict=True):
        counts.fill(dataset=dataset, step=np.repeat(step, number)) if number else counts.fill(dataset=dataset, step=[])
    return spectrum, counts


def pair_mass(first: ak.Array, second: ak.Array) -> np.ndarray:
    """Invariant masses in GeV of pairs of muons with pt (GeV), eta and phi."""
    # In double precision: the difference below loses the single-precision digits of light pairs.
    pt1, eta1, phi1, pt2, eta2, phi2 = (
        ak.to_numpy(ak.flatten(value, axis=None)).astype(np.float64)
        for muon in (first, second)
        for value in (muon.pt, muon.eta, muon.phi)
    )
    energy1, energy2 = (np.sqrt(MUON_MASS**2 + (pt * np.cosh(eta)) ** 2) for pt, eta in ((pt1, eta1), (pt2, eta2)))
    momenta = pt1 * pt2 * (np.cos(phi1 - phi2) + np.sinh(eta1) * np.sinh(eta2))
    return np.sqrt(np.maximum(2 * MUON_MASS**2 + 2 * (energy1 * energy2 - momenta), 0.0))


@task(tags=["merge"])
def merge(parts: list[Result]) -> Result:
    """The sum of partial results."""
    spectrum, counts = sp.new_spectrum(), sp.new_counts()
    for part in parts:
        spectrum, counts = spectrum + part[0], counts + part[1]
    return spectrum, counts


def merge_in_a_tree(parts: list[PrefectFuture[Result]]) -> PrefectFuture[Result]:
    """One future of the sum: every task merges `FAN_IN` results, so that none waits for all of them."""
    while len(parts) > 1:
        parts = [merge.submit(parts[i : i + FAN_IN]) for i in range(0, len(parts), FAN_IN)]
    return parts[0]


@flow(name="dimuon", task_runner=HTCDaskTaskRunner())
def dimuon(
    inputs: list[str] | None = None,
    output: str = "results/dimuon.png",
    tree: str = "Events",
    events_per_task: int = 100_000,
    min_pt: float = 3.0,
    max_eta: float = 2.4,
) -> dict[str, Any]:
    """Publish the mass spectrum of opposite-sign muon pairs.

    Args:
        inputs: paths, globs and URLs of NanoAOD files; some real CMS events by default.
        output: the picture to write, on the flow's host.
        tree: name of the event tree.
        events_per_task: events that one task reads.
        min_pt: lowest transverse momentum of a muon, in GeV.
        max_eta: largest absolute pseudorapidity of a muon.

    Returns:
        the numbers of the report, as JSON has them.

    Raises:
        InputError: for an input that does not exist or holds no muons.
    """
    if events_per_task < 1:
        raise InputError(f"events_per_task is {events_per_task}; one event is the least that a task can read")
    logger = get_run_logger()
    sources = find_inputs(inputs if inputs else cms_samples())
    # Local files are looked into here, before there is any worker; remote ones by the workers.
    looking = [inspect.fn(source, tree) if source.is_local else inspect.submit(source, tree) for source in sources]
    contents = [found if isinstance(found, Contents) else found.result() for found in looking]
    parts = [
        fill.submit(source, tree, found.dataset, start, min(start + events_per_task, found.events), min_pt, max_eta)
        for source, found in zip(sources, contents, strict=True)
        for start in range(0, found.events, events_per_task)
    ]
    if not parts:
        raise InputError(f"the {len(sources)} input file(s) hold no event in their tree {tree!r}")
    logger.info("%d events in %d files: %d tasks", sum(found.events for found in contents), len(sources), len(parts))
    spectrum, counts = merge_in_a_tree(parts).result()

    picture = Path(output).resolve()
    sp.draw(spectrum, picture)
    create_markdown_artifact(sp.report(spectrum, counts, picture), key="dimuon-spectrum", description="Dimuon mass")
    peaks = {name: sp.peak(spectrum, name) for name in sp.datasets(spectrum)}
    steps = {name: {step: int(counts[name, step]) for step in sp.STEPS} for name in sp.datasets(counts)}
    for name, passed in steps.items():
        highest = peaks.get(name)
        pairs = f"{passed['selected']} pairs, most at {highest}" if highest else "no pair"
        logger.info("%s: %d events, %s", name, passed["events"], pairs)
    return {
        "events": sum(passed["events"] for passed in steps.values()),
        "pairs": sum(passed["selected"] for passed in steps.values()),
        "datasets": {name: {**passed, "peak": peaks.get(name) and vars(peaks[name])} for name, passed in steps.items()},
        "picture": str(picture),
    }


def main(
    inputs: Annotated[list[str] | None, typer.Argument(help="Paths, globs or URLs; a few CMS events if none.")] = None,
    output: Annotated[str, typer.Option(help="Picture to write.")] = "results/dimuon.png",
    tree: Annotated[str, typer.Option(help="Name of the event tree.")] = "Events",
    events_per_task: Annotated[int, typer.Option(help="Events that one task reads.", min=1)] = 100_000,
    min_pt: Annotated[float, typer.Option(help="Lowest pt of a muon, in GeV.")] = 3.0,
    max_eta: Annotated[float, typer.Option(help="Largest |eta| of a muon.")] = 2.4,
    workers: Annotated[int | None, typer.Option(help="HTCondor workers at most; else as configured.", min=1)] = None,
) -> None:
    """Publish the mass spectrum of opposite-sign muon pairs in CMS NanoAOD, from HTCondor workers."""
    run = dimuon
    if workers is not None:
        run = dimuon.with_options(task_runner=HTCDaskTaskRunner(adapt_kwargs={"minimum": 0, "maximum": workers}))
    found = run(inputs, output, tree, events_per_task, min_pt, max_eta)
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    cli = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    cli.command()(main)
    try:
        cli()
    except (InputError, SamplesError, SettingsError, HTCDaskError, EmbeddedError) as exc:
        sys.exit(f"dimuon: {exc}")
