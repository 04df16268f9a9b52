"""``python -m benchmarks [--only NAME,NAME]``: run benchmarks, one JSON line each on stdout, words on stderr."""

from __future__ import annotations

import importlib
import sys
import traceback
from typing import Annotated

import typer

from benchmarks.result import Result

NAMES = (
    "submit",
    "start",
    "cleanup",
    "plugin",
    "adaptive-sim",
    "adaptive-pool",
    "throughput",
    "scaling",
    "dag",
    "postgres",
    "soak",
)
"""Each is a module or package here, with underscores for hyphens."""


def main(
    only: Annotated[str, typer.Option(help=f"names, separated by commas, of {', '.join(NAMES)}; all by default")] = "",
) -> None:
    """Run benchmarks; the exit status is 0 where all ran, met or not, since these machines are noisy."""
    names = [name.strip() for name in only.split(",") if name.strip()] or list(NAMES)
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise typer.BadParameter(
            f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}", param_hint="--only"
        )
    failed = []
    for name in names:
        print(f"benchmark {name} …", file=sys.stderr, flush=True)
        try:
            result: Result = importlib.import_module(f"benchmarks.{name.replace('-', '_')}").run()
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        print(result.line(), flush=True)
    if failed:
        print(f"did not run: {', '.join(failed)}", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
