"""Run the fault matrix and print it as one table: ``python -m tools.faults_report [pytest arguments]``.

Exit status 0 only where every row that can be run here was met. A row that cannot, such as one that needs root, is
neither met nor a failure: it is named with the reason, and with ``--complete`` it counts as not met.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

RESULTS = Path("results/faults.jsonl")
COLUMNS = ("row", "flow", "not ended", "lost", "again", "jobs", "clusters", "s", "met")


def main() -> int:
    """Run all rows, or those that pytest's arguments choose, and print what they measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="results", type=Path, help="print the results of an earlier run from this file")
    parser.add_argument("--complete", action="store_true", help="a row that was not run counts as not met")
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each row")
    arguments, chosen = parser.parse_known_args()
    status = 0
    path = arguments.results or RESULTS
    if arguments.results is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        # Figures go to the standard output, and pytest's own words to the other.
        status = subprocess.run(
            [sys.executable, "-m", "pytest", "tests/faults", "-m", "faults", "-q", *chosen],
            env={**os.environ, "HTCDASK_FAULTS_RESULTS": str(path.absolute())},
            stdout=sys.stderr,
        ).returncode
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except OSError as exc:
        print(f"no row was run: {exc}", file=sys.stderr)
        return 1
    if arguments.json:
        for row in rows:
            print(json.dumps(row))
    else:
        show(rows, arguments.complete)
    return 0 if status == 0 and all_met(rows, arguments.complete) else 1


def all_met(rows: list[dict[str, Any]], complete: bool) -> bool:
    """Whether rows were run, and all of them met; with `complete`, whether none was left out besides."""
    run = [row for row in rows if not row["not_run"]]
    return bool(run) and all(row["met"] for row in run) and (not complete or len(run) == len(rows))


def show(rows: list[dict[str, Any]], complete: bool) -> None:
    """Print the table, then what is wrong and what was not run."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table(title="Faults, and what was left", caption="* after the sweep; jobs, clusters: left, after seconds")
    for name in COLUMNS:
        table.add_column(name, overflow="fold", justify="left" if name in ("row", "flow", "met") else "right")
    for row in rows:
        table.add_row(
            escape(row["name"]),
            row["flow"] or "-",
            _number(row["not_terminal"]) + ("*" if row["swept"] else ""),
            _number(row["lost"]),
            _number(row["again"]),
            _left(row, "jobs"),
            _left(row, "clusters"),
            f"{row['seconds']:.0f}",
            _verdict(row),
        )
    console.print(table)
    for row in rows:
        if row["not_run"]:
            console.print(f"{row['name']}: not run: {row['not_run']}", markup=False)
        for complaint in row["complaints"]:
            console.print(f"{row['name']}: {complaint}", markup=False)
    left_out = sum(bool(row["not_run"]) for row in rows)
    console.print(f"{sum(row['met'] for row in rows)} of {len(rows) - left_out} rows met")
    if left_out:
        counts = "count as not met (--complete)" if complete else "leave the exit status as it is"
        console.print(f"{left_out} rows were not run here, for the reasons above; they {counts}")


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _left(row: dict[str, Any], what: str) -> str:
    """How many are left, and when there were none, with the bound of the row."""
    if row[what] is None:
        return "-"
    return f"{row[what]}, {row[f'{what}_after']:.1f} of {row[f'{what}_bound']:.0f} s"


def _verdict(row: dict[str, Any]) -> str:
    if row["not_run"]:
        return "[yellow]not run[/]"
    return "[green]met[/]" if row["met"] else "[red]NOT MET[/]"


if __name__ == "__main__":
    sys.exit(main())
