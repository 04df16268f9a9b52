"""The logic of the flows, fast: on files made here and threads of this process."""

from __future__ import annotations

import asyncio
import math
import queue
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import awkward as ak
import hist
import numpy as np
import pytest
import uproot
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from prefect.task_runners import ThreadPoolTaskRunner

import dimuon as dm
import percolation as pc
import samples
import spectrum as sp
from tests.support.nanoaod import Muon, as_arrays, back_to_back, write_nanoaod
from tests.support.prefect_fixtures import PrefectServer

muons = st.fixed_dictionaries(
    {
        "pt": st.floats(0.5, 500),
        "eta": st.floats(-2.5, 2.5),
        "phi": st.floats(-3.14, 3.14),
        "charge": st.sampled_from([-1, 1]),
    }
)
events_strategy = st.lists(st.lists(muons, max_size=4), max_size=12)


def four_vector_mass(first: Muon, second: Muon) -> float:
    """The invariant mass by the sum of four-vectors, another way than the flow's."""
    total = np.zeros(4)
    for muon in (first, second):
        px, py = muon["pt"] * math.cos(muon["phi"]), muon["pt"] * math.sin(muon["phi"])
        pz = muon["pt"] * math.sinh(muon["eta"])
        total += [math.sqrt(dm.MUON_MASS**2 + px**2 + py**2 + pz**2), px, py, pz]
    return math.sqrt(max(total[0] ** 2 - (total[1:] ** 2).sum(), 0.0))


@given(muons, muons)
def test_mass_is_that_of_the_summed_four_vectors(first: Muon, second: Muon) -> None:
    pair = [ak.Array([muon]) for muon in (first, second)]
    (mass,) = dm.pair_mass(*pair)
    assert mass >= 2 * dm.MUON_MASS * (1 - 1e-3)
    assert mass == pytest.approx(four_vector_mass(first, second), rel=1e-3, abs=2e-2)


@pytest.mark.parametrize("mass", sp.RESONANCES.values())
def test_a_resonance_falls_into_its_bin(mass: float) -> None:
    spectrum, counts = dm.fill_histograms(as_arrays([back_to_back(mass)] * 3), "data", 0.0, 2.4)
    highest = sp.peak(spectrum)
    assert highest is not None and highest.low < mass < highest.high and highest.pairs == 3
    assert [counts["data", step] for step in sp.STEPS] == [3, 3, 3, 3]


def test_selection_counts_each_step() -> None:
    low_pt = [{"pt": 1.0, "eta": 0.0, "phi": 0.0, "charge": 1}, {"pt": 9.0, "eta": 0.0, "phi": 2.0, "charge": -1}]
    forward = [{"pt": 9.0, "eta": 2.45, "phi": 0.0, "charge": 1}, {"pt": 9.0, "eta": 0.0, "phi": 2.0, "charge": -1}]
    events = [back_to_back(91.2), back_to_back(91.2, charge=1), low_pt, forward, [], back_to_back(91.2)[:1]]
    _, counts = dm.fill_histograms(as_arrays(events), "data", 3.0, 2.4)
    assert {step: counts["data", step] for step in sp.STEPS} == {
        "events": 6,
        "two muons": 4,
        "opposite sign": 3,
        "selected": 1,
    }


@given(events_strategy, st.integers(1, 5))
@settings(deadline=None)
def test_parts_add_up_however_the_events_are_split(events: list[list[Muon]], size: int) -> None:
    whole = dm.fill_histograms(as_arrays(events), "data", 1.0, 2.4)
    parts = [dm.fill_histograms(as_arrays(events[i : i + size]), "data", 1.0, 2.4) for i in range(0, len(events), size)]
    other = dm.fill_histograms(as_arrays(events[:1]), "other", 1.0, 2.4)
    merged = dm.merge.fn([*parts, other])
    for mine, theirs in zip(whole, merged, strict=True):
        for name in mine.axes["dataset"]:
            if name in theirs.axes["dataset"]:
                assert (mine[name, :].values() == theirs[name, :].values()).all()
            else:
                assert mine[name, :].values().sum() == 0
    assert merged[1].project("step").values()[0] == len(events) + len(events[:1])


def test_the_report_shows_every_pair(tmp_path: Path) -> None:
    events = [back_to_back(91.2)] * 4 + [back_to_back(3.1)] * 2
    spectrum, counts = dm.fill_histograms(as_arrays(events), "run (data)", 0.0, 2.4)
    text = sp.report(spectrum, counts, tmp_path / "picture.png")
    bars = text.split("bar [")[1].split("]")[0].split(",")
    assert sum(map(int, bars)) == 6 and len(bars) == sp.BINS
    assert "| run (data) | 6 | 6 | 6 | 6 | 86.9 to 95.6 GeV (4 ± 2.0 pairs) |" in text


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_draws_data_and_simulation(tmp_path: Path, suffix: str) -> None:
    data = dm.fill_histograms(as_arrays([back_to_back(91.2)] * 4), "a (data)", 0.0, 2.4)
    simulated = dm.fill_histograms(as_arrays([back_to_back(3.1)]), "b (simulation)", 0.0, 2.4)
    spectrum, _ = dm.merge.fn([data, simulated])
    sp.draw(spectrum, tmp_path / "new" / f"spectrum.{suffix}")
    assert (tmp_path / "new" / f"spectrum.{suffix}").stat().st_size > 5000


def test_draws_an_empty_spectrum(tmp_path: Path) -> None:
    empty: hist.Hist = sp.new_spectrum()
    assert sp.peak(empty) is None
    sp.draw(empty, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").exists()


def threaded_dimuon(**parameters: object) -> dict[str, object]:
    run = dm.dimuon.with_options(task_runner=ThreadPoolTaskRunner(max_workers=4))
    result: dict[str, object] = run(**parameters)
    return result


def test_flow_reads_globs_in_entry_ranges(prefect_api: PrefectServer, tmp_path: Path) -> None:
    write_nanoaod(tmp_path / "run1.root", [back_to_back(91.2)] * 7 + [[]] * 4)
    write_nanoaod(tmp_path / "dy.root", [back_to_back(3.1)] * 3, simulated=True)
    picture = tmp_path / "out" / "spectrum.png"
    found = threaded_dimuon(inputs=[f"{tmp_path}/*.root"], output=str(picture), events_per_task=2, min_pt=0.5)
    assert found["events"] == 14 and found["pairs"] == 10
    numbers = found["datasets"]
    assert isinstance(numbers, dict)
    assert numbers["run1 (data)"]["peak"]["pairs"] == 7
    assert numbers["dy (simulation)"]["peak"]["low"] < 3.1 < numbers["dy (simulation)"]["peak"]["high"]
    assert picture.exists()


@contextmanager
def web_server(directory: Path) -> Iterator[str]:
    """The URL of a web server for a directory; it serves parts of files, as uproot asks for them."""
    started: queue.Queue[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]] = queue.Queue()

    async def serve() -> None:
        application = web.Application()
        application.router.add_static("/", directory)
        runner = web.AppRunner(application, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        over = asyncio.Event()
        started.put((asyncio.get_running_loop(), over, runner.addresses[0][1]))
        await over.wait()
        await runner.cleanup()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    loop, over, port = started.get(timeout=30)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(30)


@pytest.mark.parametrize("scheme", ["file", "http"])
def test_flow_reads_a_url(scheme: str, prefect_api: PrefectServer, tmp_path: Path) -> None:
    path = write_nanoaod(tmp_path / "run1.root", [back_to_back(91.2)] * 3)
    with web_server(tmp_path) as address:
        url = path.as_uri() if scheme == "file" else f"{address}/{path.name}"
        found = threaded_dimuon(inputs=[url], output=str(tmp_path / "s.png"))
    assert found["pairs"] == 3


def test_large_local_files_do_not_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_nanoaod(tmp_path / "run1.root", [back_to_back(91.2)] * 3)
    (small,) = dm.find_inputs([str(path), f"{tmp_path}/*"])
    assert small.content == path.read_bytes()
    monkeypatch.setattr(dm, "SHIPPED", 10)
    (large,) = dm.find_inputs([str(path)])
    assert large.content is None
    path.unlink()
    assert dm.inspect.fn(small, "Events") == dm.Contents(3, "run1 (data)")
    with pytest.raises(dm.InputError, match=r"not visible on .* share, or name it by a URL"):
        dm.inspect.fn(large, "Events")


def test_bad_inputs_are_named_before_any_task(prefect_api: PrefectServer, tmp_path: Path) -> None:
    with uproot.recreate(tmp_path / "flat.root") as file:
        for tree, branch in (("events", "pt1"), ("Events", "Muon_pt")):
            file.mktree(tree, {branch: np.float64}).extend({branch: np.ones(3)})
    (tmp_path / "text.root").write_text("no ROOT file at all, though its name says so")
    (tmp_path / "cut.root").write_bytes((tmp_path / "flat.root").read_bytes()[:60])
    empty = write_nanoaod(tmp_path / "empty.root", [])
    for inputs, parameters, message in (
        ([f"{tmp_path}/none*.root"], {}, "none.*names no file"),
        ([str(tmp_path / "flat.root")], {"tree": "Delphes"}, "no tree 'Delphes'; it holds Events, events"),
        ([str(tmp_path / "flat.root")], {}, "has no Muon_eta, Muon_phi, Muon_charge"),
        ([str(tmp_path / "text.root")], {}, "is no whole ROOT file"),
        ([str(tmp_path / "cut.root")], {}, "is no whole ROOT file"),
        ([str(empty)], {}, "hold no event"),
        ([str(empty)], {"events_per_task": 0}, "events_per_task is 0"),
    ):
        with pytest.raises(dm.InputError, match=message):
            threaded_dimuon(inputs=inputs, **parameters)


def test_samples_are_the_tested_ones_and_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = samples.cms_samples(tmp_path / "samples")
    assert [Path(path).name for path in paths] == list(samples.SHA256)
    Path(paths[0]).write_bytes(b"cut short")
    assert samples.cms_samples(tmp_path / "samples") == paths
    assert all(samples._is_intact(Path(path)) for path in paths)
    assert {Path(path).name for path in paths} | {".lock"} == {path.name for path in (tmp_path / "samples").iterdir()}
    monkeypatch.setattr(samples, "DISTRIBUTION", "prefect-htcdask-no-such-distribution==1")
    assert samples.cms_samples(tmp_path / "samples") == paths  # not asked for again
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(samples.SamplesError, match="name files of your own"):
        samples.cms_samples(tmp_path / "elsewhere")


@given(st.integers(1, 12), st.floats(0, 1), st.integers(0, 1000))
@settings(deadline=None)
def test_conducting_lattice_has_a_path(size: int, density: float, seed: int) -> None:
    source = random.Random(seed)
    is_open = [[source.random() < density for _ in range(size)] for _ in range(size)]
    rows = {(0, column) for column in range(size) if is_open[0][column]}
    while True:  # grows the connected region by whole generations, another way than the flow's
        near = {(r + a, c + b) for r, c in rows for a, b in ((0, 1), (1, 0), (0, -1), (-1, 0))}
        more = {(r, c) for r, c in near if 0 <= r < size and 0 <= c < size and is_open[r][c]} - rows
        if not more:
            break
        rows |= more
    assert pc.conducts(size, density, random.Random(seed)) == any(row == size - 1 for row, _ in rows)


def test_percolation_finds_the_threshold(prefect_api: PrefectServer) -> None:
    run = pc.percolation.with_options(task_runner=ThreadPoolTaskRunner(max_workers=2))
    found = run(size=24, trials=60, points=6, low=0.45, high=0.75)
    assert found["fractions"][0] < 0.1 and found["fractions"][-1] > 0.9
    # The lattice is small and the trials are few: 60 of them give the crossing to about 0.01.
    assert found["threshold"] == pytest.approx(pc.LITERATURE, abs=0.03)
    assert run(size=24, trials=60, points=6, low=0.45, high=0.75) == found


def test_percolation_refuses_what_cannot_be_swept(prefect_api: PrefectServer) -> None:
    run = pc.percolation.with_options(task_runner=ThreadPoolTaskRunner(max_workers=2))
    for parameters, message in (
        ({"low": 0.7, "high": 0.6}, "low is below high"),
        ({"high": 1.5}, "from 0 to 1"),
        ({"trials": 0}, "trials = 0: at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**parameters)


def test_no_crossing_within_range() -> None:
    assert pc.crossing([0.1, 0.2], [0.0, 0.1]) is None
    assert pc.crossing([0.1, 0.2], [0.0, 1.0]) == pytest.approx(0.15)
