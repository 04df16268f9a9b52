"""Events in files as CMS writes them."""

from __future__ import annotations

import math
from pathlib import Path

import awkward as ak
import numpy as np
import uproot

import dimuon as dm

Muon = dict[str, float]


def as_arrays(events: list[list[Muon]]) -> ak.Array:
    """Events with the branches of NanoAOD."""
    columns = {"Muon_pt": np.float32, "Muon_eta": np.float32, "Muon_phi": np.float32, "Muon_charge": np.int32}
    counts = np.array([len(event) for event in events], dtype=np.int64)
    return ak.zip(
        {
            name: ak.unflatten(
                np.array([muon[name.removeprefix("Muon_")] for event in events for muon in event], dtype=kind), counts
            )
            for name, kind in columns.items()
        },
        depth_limit=1,
    )


def write_nanoaod(path: Path, events: list[list[Muon]], simulated: bool = False) -> Path:
    """A ROOT file with an event tree as NanoAOD has it."""
    arrays = as_arrays(events)
    zipped = ak.zip({name.removeprefix("Muon_"): arrays[name] for name in dm.BRANCHES})
    branches = {"Muon": zipped, "event": np.arange(len(events))}
    if simulated:
        branches["genWeight"] = np.ones(len(events), dtype=np.float32)
    with uproot.recreate(path) as file:
        tree = file.mktree("Events", {name: ak.type(value) for name, value in branches.items()})
        tree.extend(branches)
    return path


def back_to_back(mass: float, charge: int = -1) -> list[Muon]:
    """Two muons of a resonance at rest: each carries half of its mass as energy."""
    momentum = math.sqrt((mass / 2) ** 2 - dm.MUON_MASS**2)
    return [
        {"pt": momentum, "eta": 0.0, "phi": 0.3, "charge": 1},
        {"pt": momentum, "eta": 0.0, "phi": 0.3 - math.pi, "charge": charge},
    ]
