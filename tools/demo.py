"""``make demo``: a real CMS analysis on real HTCondor workers behind a real Dask Gateway, all of it of this checkout.

The Prefect server, the HTCondor pool and the Dask Gateway are this run's own: on loopback, at free ports, with their
state below `.cache/demo`. None of them outlives the run, however it ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated

import psutil
import typer
from filelock import FileLock, Timeout
from rich.console import Console

from tools.prefect_server import ServerError, prefect_server

CHECKOUT = Path(__file__).resolve().parent.parent
SETTING = "PREFECT_INTEGRATIONS_HTCDASK_"
FOREIGN = ("PREFECT_", "DASK_", "CONDOR_", "_CONDOR_")
"""Beginnings of environment variables that would point the demo at the user's own server, gateway or pool."""

FLOW_END = 300.0
"""Seconds that an interrupted flow has to remove its workers, and what is ours to end; mostly it takes a few."""

console = Console(highlight=False, soft_wrap=True)


def main(
    state: Annotated[Path, typer.Option(help="Directory for all that the demo keeps.")] = CHECKOUT / ".cache" / "demo",
    picture: Annotated[Path, typer.Option(help="The picture to write.")] = CHECKOUT / "results" / "dimuon.png",
) -> None:
    """Run the demo; the exit status is 0 where the flow completed and nothing was left behind."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    state = state.resolve()
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with FileLock(state / "lock").acquire(timeout=0):
            sys.exit(_run(state, picture.resolve()))
    except Timeout:
        sys.exit(_complain("another `make demo` runs in this checkout; wait for it, or use another clone"))


def _interrupt(number: int, frame: object) -> None:
    # Once is enough: a second Ctrl-C would interrupt the cleaning up, which takes seconds.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def _run(state: Path, picture: Path) -> int:
    started = time.monotonic()
    console.print("[bold]A CMS dimuon spectrum, on HTCondor workers behind a Dask Gateway[/bold]")
    _isolate(state)
    status = 1
    try:
        with ExitStack() as stack:
            server = stack.enter_context(prefect_server(state / "prefect", ui=True))
            os.environ.update(server.environment)
            _show("Prefect UI", f"{server.ui} (while this runs)")
            stack.callback(_stop_embedded)
            _start_embedded()
            _show("Set-up", f"{time.monotonic() - started:.1f} s")
            status = _analyse(picture)
            # It may still wait for the last of its jobs to leave the pool, which is stopped next.
            _await_end(state, ["-m", "prefect_htcdask.supervisor"])
    except KeyboardInterrupt:
        status = 130
    except ServerError as exc:
        _complain(str(exc))
    except Exception as exc:
        _complain(f"{type(exc).__name__}: {exc}")
    left = _await_end(state)
    if left:
        return _complain(f"these processes are left behind: {', '.join(left)}")
    seconds = time.monotonic() - started
    console.print(f"Server, pool and gateway are stopped, and no process is left ({seconds:.0f} s in all)")
    return status


def _isolate(state: Path) -> None:
    """Leave the user's own profile, server, gateway and pool out of it."""
    for name in list(os.environ):
        if name.startswith(FOREIGN):
            del os.environ[name]
    os.environ[f"{SETTING}EMBEDDED_DIRECTORY"] = str(state / "embedded")
    os.environ[f"{SETTING}EMBEDDED_USE_CONFIGURED_POOL"] = "false"
    # A safety net: should this process be killed, they stop by themselves.
    os.environ[f"{SETTING}EMBEDDED_IDLE_TIMEOUT"] = "300"
    os.environ[f"{SETTING}CONDOR_DIRECTORY"] = str(state / "runs")
    os.environ["DASK_CONFIG"] = str(state / "dask")


def _start_embedded() -> None:
    import dask

    from prefect_htcdask.embedded import ensure_running
    from prefect_htcdask.settings import load_settings

    # The user's configuration files may name a gateway.
    dask.config.set({"gateway.address": None})
    with console.status("HTCondor pool and Dask Gateway") as spinner:
        endpoint = ensure_running(
            load_settings().embedded, timeout=600, progress=lambda text: spinner.update(f"HTCondor: {text}")
        )
    _show("HTCondor", f"{endpoint.versions['HTCondor']}, a pool of its own")
    version = endpoint.versions["dask-gateway-server"]
    _show("Dask Gateway", f"{endpoint.gateway_address}, a stock dask-gateway-server {version}")


def _stop_embedded() -> None:
    from prefect_htcdask.embedded import stop
    from prefect_htcdask.settings import load_settings

    stop(load_settings().embedded)


def _analyse(picture: Path) -> int:
    """Run the flow in a process of its own, whose end sends the last of its logs; returns that one's exit status."""
    command = [sys.executable, "-m", "tools.demo_flow", str(picture)]
    # In a session of its own, so that Ctrl-C reaches it once, from here.
    process = subprocess.Popen(command, cwd=CHECKOUT, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        return process.wait()
    except KeyboardInterrupt:
        console.print("Interrupted: the flow removes its workers")
        process.send_signal(signal.SIGINT)
        try:
            process.wait(FLOW_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return 130


def _show(name: str, value: str) -> None:
    console.print(f"[bold]{name:14}[/bold] {value}", markup=True)


def _complain(text: str) -> int:
    console.print("[red]demo:[/red]", end=" ")
    console.print(text, markup=False)
    return 1


def _await_end(state: Path, command: Sequence[str] = ()) -> list[str]:
    """Wait for processes of the demo to end by themselves; returns those that did not within `FLOW_END`.

    Args:
        state: the demo's state directory.
        command: arguments that the processes have; all of the demo's by default.
    """
    deadline = time.monotonic() + FLOW_END
    while left := _processes(state, command):
        _, alive = psutil.wait_procs(left, timeout=max(0.0, deadline - time.monotonic()))
        if alive and time.monotonic() > deadline:
            return [_words(process) for process in alive]
    return []


def _words(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return f"{process.pid} ({' '.join(process.cmdline())[:100] or process.name()})"
    return str(process.pid)


def _processes(state: Path, command: Sequence[str]) -> list[psutil.Process]:
    """Processes of this user that have to do with the demo's state directory, by command line or environment."""
    left = []
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            line = process.cmdline()
            told = [*line, *process.environ().values()]
            if any(str(state) in text for text in told) and set(command) <= set(line):
                left.append(process)
        except psutil.Error:  # ended meanwhile, or another user's
            continue
    return left


if __name__ == "__main__":
    typer.run(main)
