"""The dimuon mass spectrum: its bins, its highest bin, its picture and its report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import hist
import numpy as np

RESONANCES = {
    "η": 0.5479,
    "ρ, ω": 0.7827,  # noqa: RUF001
    "φ": 1.0195,
    "J/ψ": 3.0969,
    "ψ(2S)": 3.6861,
    "Υ": 9.4604,  # noqa: RUF001
    "Z": 91.1880,
}
"""Masses in GeV of what decays to two muons (Particle Data Group, 2024)."""

BINS = 74
LOWEST, HIGHEST = (RESONANCES["Z"] * 1.1**power for power in (-61.5, 12.5))
"""Range in GeV, from just above twice the muon's mass: the bins grow by a tenth each, and the Z is amid one of them."""

STEPS = ("events", "two muons", "opposite sign", "selected")
"""What is counted on the way: events, events with two muons or more, opposite-sign pairs, pairs within acceptance."""


@dataclass(frozen=True)
class Peak:
    """The bin with most pairs, and nothing beyond: no resonance is claimed from it. Masses in GeV."""

    low: float
    high: float
    pairs: int

    @property
    def centre(self) -> float:
        """Geometric centre, since the bins are equal in log(m)."""
        return math.sqrt(self.low * self.high)

    def __str__(self) -> str:
        return f"{self.low:.1f} to {self.high:.1f} GeV ({self.pairs} ± {math.sqrt(self.pairs):.1f} pairs)"


def new_spectrum() -> hist.Hist:
    """An empty spectrum: dataset by mass."""
    return hist.Hist(
        hist.axis.StrCategory([], growth=True, name="dataset"),
        hist.axis.Regular(BINS, LOWEST, HIGHEST, transform=hist.axis.transform.log, name="mass", label="m(μμ) [GeV]"),
        storage=hist.storage.Int64(),
    )


def new_counts() -> hist.Hist:
    """An empty table: dataset by step of the selection."""
    return hist.Hist(
        hist.axis.StrCategory([], growth=True, name="dataset"),
        hist.axis.StrCategory(STEPS, name="step"),
        storage=hist.storage.Int64(),
    )


def datasets(spectrum: hist.Hist) -> list[str]:
    """Names of the data sets in it, sorted."""
    return sorted(spectrum.axes["dataset"])


def peak(spectrum: hist.Hist, dataset: str | None = None) -> Peak | None:
    """The bin with most pairs (the lowest of equals) of one data set, or of all; None if there is no pair."""
    values = spectrum.project("mass").values() if dataset is None else spectrum[dataset, :].values()
    if not values.any():
        return None
    highest = int(np.argmax(values))
    edges = spectrum.axes["mass"].edges
    return Peak(float(edges[highest]), float(edges[highest + 1]), int(values[highest]))


def draw(spectrum: hist.Hist, path: Path) -> None:
    """Write the spectrum as a picture, of the format that the path's suffix names.

    Raises:
        ValueError: for a suffix that matplotlib does not write.
    """
    import matplotlib

    matplotlib.use("agg")
    import mplhep
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    edges = spectrum.axes["mass"].edges
    names = datasets(spectrum)
    values = [spectrum[name, :].values() for name in names]
    for name, counts in zip(names, values, strict=True):
        if name.endswith("(simulation)"):
            mplhep.histplot(counts, bins=edges, ax=axes, histtype="fill", alpha=0.45, label=name)
        else:
            points = {"yerr": np.sqrt(counts), "histtype": "errorbar", "markersize": 5}
            mplhep.histplot(np.where(counts, counts, np.nan), bins=edges, ax=axes, label=name, **points)
    top = max([1, *(int(counts.max()) for counts in values)])
    for name, mass in RESONANCES.items():
        axes.axvline(mass, color="0.75", linewidth=0.8, zorder=0)
        axes.text(mass, top * 3, name, rotation=90, ha="right", va="top", color="0.4", fontsize=10)
    axes.set(xscale="log", yscale="log", xlim=(LOWEST, HIGHEST), ylim=(0.5, top * 4))
    axes.set(xlabel=spectrum.axes["mass"].label, ylabel="opposite-sign pairs per bin")
    axes.set_title("Dimuon mass, CMS NanoAOD; simulation not normalised to data", fontsize=11, loc="left")
    if names:
        axes.legend(loc="upper left", bbox_to_anchor=(0.0, 0.85), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=120)
    finally:
        pyplot.close(figure)


def report(spectrum: hist.Hist, counts: hist.Hist, picture: Path) -> str:
    """The numbers in Markdown, with the spectrum as a Mermaid chart, which Prefect's UI shows."""
    lines = ["# Dimuon mass spectrum", "", "| data set | " + " | ".join(STEPS) + " | highest bin |"]
    lines.append("| --- |" + " ---: |" * len(STEPS) + " --- |")
    for name in datasets(counts):
        row = " | ".join(str(int(counts[name, step])) for step in STEPS)
        highest = peak(spectrum, name) if name in spectrum.axes["dataset"] else None
        lines.append(f"| {name} | {row} | {highest or 'no pair'} |")
    lines += ["", f"The picture is in `{picture}` on the flow's host.", "", "```mermaid", "xychart-beta"]
    every = spectrum.project("mass").values()
    low, high = math.log10(LOWEST), math.log10(HIGHEST)
    lines += [
        '    title "opposite-sign pairs, all data sets"',
        f'    x-axis "log10 of m / GeV" {low:.2f} --> {high:.2f}',
        f'    y-axis "pairs per bin" 0 --> {max(1, int(every.max()))}',
        f"    bar [{', '.join(str(int(value)) for value in every)}]",
        "```",
        "",
        "Bins are equal in log(m), 10 % of the mass wide; errors are the square root of the count. "
        "Nothing is fitted: a bin's excess over its neighbours is for the reader to judge.",
    ]
    return "\n".join(lines)
