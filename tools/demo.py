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
from contextlib import ExitStack
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
from rich.console import Console

from tools.prefect_server import ServerError, prefect_server

CHECKOUT = Path(__file__).resolve().parent.parent
STATE = CHECKOUT / ".cache" / "demo"
PICTURE = CHECKOUT / "results" / "dimuon.png"
SETTING = "PREFECT_INTEGRATIONS_HTCDASK_"
FOREIGN = ("PREFECT_", "DASK_", "CONDOR_", "_CONDOR_")
"""Beginnings of environment variables that would point the demo at the user's own server, gateway or pool."""

console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    """Run the demo; the exit status is 0 where the flow completed and nothing was left behind."""
    signal.signal(signal.SIGTERM, _interrupt)
    STATE.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = FileLock(STATE / "lock")
    try:
        with lock.acquire(timeout=0):
            return _run()
    except Timeout:
        return _complain("another `make demo` runs in this checkout; wait for it, or use another clone")


def _interrupt(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _run() -> int:
    started = time.monotonic()
    console.print("[bold]A CMS dimuon spectrum, on HTCondor workers behind a Dask Gateway[/bold]")
    _isolate()
    status = 1
    try:
        with ExitStack() as stack:
            server = stack.enter_context(prefect_server(STATE / "prefect", ui=True))
            os.environ.update(server.environment)
            _show("Prefect UI", f"{server.ui} (while this runs)")
            stack.callback(_stop_embedded)
            _start_embedded()
            _show("Set-up", f"{time.monotonic() - started:.1f} s")
            status = _analyse()
    except KeyboardInterrupt:
        console.print("[red]interrupted[/red]")
    except ServerError as exc:
        _complain(str(exc))
    except Exception as exc:
        _complain(f"{type(exc).__name__}: {exc}")
    left = _left_behind()
    if left:
        return _complain(f"these processes are left behind: {', '.join(left)}")
    seconds = time.monotonic() - started
    console.print(f"Server, pool and gateway are stopped, and no process is left; {seconds:.0f} s in all.")
    return status


def _isolate() -> None:
    """Leave the user's own profile, server, gateway and pool out of it."""
    for name in list(os.environ):
        if name.startswith(FOREIGN):
            del os.environ[name]
    os.environ[f"{SETTING}EMBEDDED_DIRECTORY"] = str(STATE / "embedded")
    os.environ[f"{SETTING}EMBEDDED_USE_CONFIGURED_POOL"] = "false"
    # A safety net: should this process be killed, they stop by themselves.
    os.environ[f"{SETTING}EMBEDDED_IDLE_TIMEOUT"] = "300"
    os.environ[f"{SETTING}CONDOR_DIRECTORY"] = str(STATE / "runs")
    os.environ["DASK_CONFIG"] = str(STATE / "dask")


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


def _analyse() -> int:
    """Run the flow in a process of its own, whose end sends the last of its logs; returns that one's exit status."""
    process = subprocess.Popen([sys.executable, "-m", "tools.demo_flow", str(PICTURE)], cwd=CHECKOUT)
    try:
        return process.wait()
    except KeyboardInterrupt:
        # Ctrl-C in a terminal has reached it too; a plain `kill` has not. It removes its workers, then ends.
        if process.poll() is None and not os.isatty(0):
            process.send_signal(signal.SIGINT)
        try:
            process.wait(45)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise


def _show(name: str, value: str) -> None:
    console.print(f"[bold]{name:14}[/bold] {value}", markup=True)


def _complain(text: str) -> int:
    console.print("[red]demo:[/red]", end=" ")
    console.print(text, markup=False)
    return 1


def _left_behind() -> list[str]:
    """Processes of this user that have to do with the demo's state directory, by command line or environment."""
    left = []
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            told = [*process.cmdline(), *process.environ().values()]
            if any(str(STATE) in text for text in told):
                left.append(f"{process.pid} ({process.name()})")
        except psutil.Error:  # ended meanwhile, or another user's
            continue
    return left


if __name__ == "__main__":
    sys.exit(main())
