"""The command ``prefect``, and a process worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


PREFECT = [sys.executable, "-m", "prefect", "--no-prompt"]


def prefect(*arguments: str) -> str:
    """Run Prefect's command in the checkout, as deployments/prefect.yaml says."""
    done = subprocess.run(
        [*PREFECT, *arguments],
        cwd=CHECKOUT,
        env={**os.environ, "PWD": str(CHECKOUT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def process_worker(log: Path, environment: Mapping[str, str] = os.environ) -> Iterator[subprocess.Popen[bytes]]:
    """A process worker of the pool; it runs elsewhere than in the checkout, as a service does."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*PREFECT, "worker", "start", "--pool", "htcdask", "--name", "test"],
            cwd=log.parent,
            env={**environment, "PREFECT_WORKER_QUERY_SECONDS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)
