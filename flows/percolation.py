"""Site percolation: at which density does a square lattice conduct from top to bottom?

A parameter sweep by Monte Carlo in plain Python: no data, no library but Prefect. Each task tries one density on many
random lattices; hundreds of them keep as many HTCondor workers busy.

    python flows/percolation.py --size 128 --trials 200 --workers 20
"""

from __future__ import annotations

import json
import math
import random
import sys
from typing import Annotated, Any

import typer
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact

from prefect_htcdask import HTCDaskError, HTCDaskTaskRunner
from prefect_htcdask.embedded.errors import EmbeddedError
from prefect_htcdask.settings import SettingsError

LITERATURE = 0.592746
"""Threshold of the infinite lattice (Newman and Ziff, Phys. Rev. Lett. 85, 4104, 2000)."""


def conducts(size: int, density: float, source: random.Random) -> bool:
    """Whether open sites connect the top row of a random lattice of `size` squared sites to its bottom row."""
    is_open = [[source.random() < density for _ in range(size)] for _ in range(size)]
    reached = [(0, column) for column in range(size) if is_open[0][column]]
    for _, column in reached:
        is_open[0][column] = False
    while reached:
        row, column = reached.pop()
        if row == size - 1:
            return True
        for below, beside in ((row + 1, column), (row, column - 1), (row, column + 1), (row - 1, column)):
            if 0 <= below < size and 0 <= beside < size and is_open[below][beside]:
                is_open[below][beside] = False
                reached.append((below, beside))
    return False


@task(retries=1, tags=["percolation"])
def count_conducting(density: float, size: int, trials: int, seed: int) -> int:
    """How many of `trials` random lattices conduct; the same seed gives the same answer on any worker."""
    source = random.Random(f"{seed} {size} {density}")
    return sum(conducts(size, density, source) for _ in range(trials))


def crossing(densities: list[float], fractions: list[float]) -> float | None:
    """The density at which half of the lattices conduct, by linear interpolation; None if that is not within range."""
    for (low, below), (high, above) in zip(
        zip(densities, fractions, strict=True), zip(densities[1:], fractions[1:], strict=True), strict=False
    ):
        if below < 0.5 <= above:
            return low + (0.5 - below) / (above - below) * (high - low)
    return None


@flow(name="percolation", task_runner=HTCDaskTaskRunner())
def percolation(
    size: int = 64, trials: int = 50, points: int = 16, low: float = 0.55, high: float = 0.63, seed: int = 1
) -> dict[str, Any]:
    """Publish how the share of conducting lattices grows with the density of open sites.

    Args:
        size: sites along an edge.
        trials: random lattices for each density.
        points: densities, evenly from `low` to `high`.
        low: lowest density of open sites.
        high: highest density of open sites.
        seed: of the random numbers.

    Returns:
        densities, the share that conducts with its binomial error, and the density where that is one half.

    Raises:
        ValueError: for a range or a number that cannot be swept.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"low = {low} and high = {high}: densities run from 0 to 1, and low is below high")
    for name, value, least in (("size", size, 1), ("trials", trials, 1), ("points", points, 2)):
        if value < least:
            raise ValueError(f"{name} = {value}: at least {least} is needed")
    densities = [low + (high - low) * point / (points - 1) for point in range(points)]
    fractions = [hits / trials for hits in count_conducting.map(densities, size, trials, seed).result()]
    errors = [math.sqrt(share * (1 - share) / trials) for share in fractions]
    threshold = crossing(densities, fractions)
    create_markdown_artifact(
        report(size, trials, densities, fractions, errors, threshold), key="percolation", description="Site percolation"
    )
    found = f"{threshold:.4f}" if threshold else "outside the range"
    get_run_logger().info("half of the lattices conduct at density %s", found)
    return {"densities": densities, "fractions": fractions, "errors": errors, "threshold": threshold}


def report(
    size: int,
    trials: int,
    densities: list[float],
    fractions: list[float],
    errors: list[float],
    threshold: float | None,
) -> str:
    """The sweep in Markdown, with a chart that Prefect's UI shows."""
    found = f"{threshold:.4f}" if threshold else "outside the range, or the trials are too few"
    rows = [f"| {p:.4f} | {f:.2f} ± {e:.2f} |" for p, f, e in zip(densities, fractions, errors, strict=True)]
    chart = [
        "```mermaid",
        "xychart-beta",
        f'    x-axis "density of open sites" {densities[0]:.4f} --> {densities[-1]:.4f}',
        '    y-axis "share that conducts" 0 --> 1',
        f"    line [{', '.join(f'{share:.3f}' for share in fractions)}]",
        "```",
    ]
    title = [f"# Site percolation on {size} by {size} sites, {trials} lattices per density", ""]
    says = [f"Half of them conduct at density **{found}** (infinite lattice: {LITERATURE}).", "", *chart, ""]
    return "\n".join([*title, *says, "| density | share that conducts |", "| ---: | ---: |", *rows])


def main(
    size: Annotated[int, typer.Option(help="Sites along an edge.", min=1)] = 64,
    trials: Annotated[int, typer.Option(help="Random lattices for each density.", min=1)] = 50,
    points: Annotated[int, typer.Option(help="Densities, and so tasks.", min=2)] = 16,
    low: Annotated[float, typer.Option(help="Lowest density.")] = 0.55,
    high: Annotated[float, typer.Option(help="Highest density.")] = 0.63,
    seed: Annotated[int, typer.Option(help="Seed of the random numbers.")] = 1,
    workers: Annotated[int | None, typer.Option(help="HTCondor workers at most; else as configured.", min=1)] = None,
) -> None:
    """Find the percolation threshold of a square lattice, on HTCondor workers."""
    run = percolation
    if workers is not None:
        run = percolation.with_options(task_runner=HTCDaskTaskRunner(adapt_kwargs={"minimum": 0, "maximum": workers}))
    typer.echo(json.dumps(run(size, trials, points, low, high, seed), indent=2))


if __name__ == "__main__":
    cli = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    cli.command()(main)
    try:
        cli()
    except (ValueError, SettingsError, HTCDaskError, EmbeddedError) as exc:
        sys.exit(f"percolation: {exc}")
