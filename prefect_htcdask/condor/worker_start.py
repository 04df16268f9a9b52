"""What an HTCondor worker job runs: a guard process, and below it the Dask worker.

The file travels with the job and is run by the interpreter of the site or image, so its first half needs the standard
library only. The guard passes SIGTERM on, ends the worker where it takes more memory than the job asked for (a starter
that does not run as root enforces no limit), and says on stderr why a worker ended: the submitting side reads that.
The Dask worker leaves by handing its tasks and results back, so that an eviction does not count against a task.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

CONFIG_FILE = "worker_config.json"
SECRETS_FILE = "worker_secrets.json"
CERTIFICATE_FILE = "dask.crt"
KEY_FILE = "dask.pem"
PACKAGE_FILE = "prefect_htcdask.zip"

EXIT_VERSIONS = 64
EXIT_MISSING = 69
EXIT_MEMORY = 75

_MEMORY_INTERVAL = 0.5
_CLOSING_TIME = 5.0


def main() -> int:
    """Guard a worker, or be one (`--worker`). Returns the exit status of the job."""
    sandbox = Path(os.environ.get("_CONDOR_SCRATCH_DIR", "."))
    if "--worker" in sys.argv[1:]:
        return run_worker(sandbox)
    return guard(sandbox)


def guard(sandbox: Path) -> int:
    """Start the worker process in `sandbox`, watch its memory, pass signals on. Returns its exit status."""
    for name in (SECRETS_FILE, KEY_FILE):
        (sandbox / name).chmod(0o600)
    config = read_config(sandbox)
    child: subprocess.Popen[bytes] | None = None
    told_early = False

    def pass_on(signum: int, _frame: object) -> None:
        nonlocal told_early
        if child is None:
            told_early = True
        elif child.poll() is None:
            child.send_signal(signal.SIGTERM)

    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, pass_on)
    child = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--worker"], cwd=sandbox)
    if told_early:
        child.terminate()
    limit = int(config["memory_limit"])
    while True:
        try:
            status = child.wait(timeout=_MEMORY_INTERVAL)
        except subprocess.TimeoutExpired:
            used = memory_of(child.pid)
            if limit and used > limit:
                for pid in [*descendants(child.pid), child.pid]:
                    _kill(pid)
                child.wait()
                say(
                    f"the worker used {used / 2**20:.0f} MiB of the {limit / 2**20:.0f} MiB that its job asked for "
                    "and was ended; raise worker.memory, or give it fewer threads"
                )
                return EXIT_MEMORY
            continue
        # A worker killed by a signal has told nobody why.
        if status < 0:
            say(f"the worker process was ended by signal {signal.Signals(-status).name}")
            return 128 - status
        return status


def say(text: str) -> None:
    """Write one line for the submitting side to find."""
    print(f"htcdask: {text}", file=sys.stderr, flush=True)


def read_config(sandbox: Path) -> dict[str, Any]:
    """The worker's configuration, which travelled with the job."""
    config: dict[str, Any] = json.loads((sandbox / CONFIG_FILE).read_text())
    return config


def memory_of(pid: int) -> int:
    """Resident bytes of a process and its descendants; pages shared between them count once per process."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = 0
    for member in [pid, *descendants(pid)]:
        try:
            total += int(Path(f"/proc/{member}/statm").read_text().split()[1]) * page
        except (OSError, IndexError, ValueError):
            continue
    return total


def descendants(pid: int) -> list[int]:
    """Children, grandchildren and so on of a process, as far as they are alive."""
    found: list[int] = []
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for thread in threads:
        try:
            children = Path(f"/proc/{pid}/task/{thread}/children").read_text().split()
        except OSError:
            continue
        for child in map(int, children):
            found += [child, *descendants(child)]
    return found


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def job_identity() -> tuple[str, int]:
    """Id of this job and how often it was started before, from the job ad in the sandbox.

    Source: HTCondor manual, environment of a running job (`_CONDOR_JOB_AD`).
    """
    attributes = {"ClusterId": "0", "ProcId": "0", "NumJobStarts": "0", "NumShadowStarts": "0"}
    path = os.environ.get("_CONDOR_JOB_AD")
    if path and os.path.exists(path):
        for line in Path(path).read_text(errors="replace").splitlines():
            name, _, value = line.partition("=")
            if name.strip() in attributes:
                attributes[name.strip()] = value.strip()
    starts = max(int(attributes["NumJobStarts"]), int(attributes["NumShadowStarts"]))
    return f"{attributes['ClusterId']}.{attributes['ProcId']}", starts


def run_worker(sandbox: Path) -> int:
    """Be the Dask worker of this job until it is told to leave. Returns the exit status."""
    config = read_config(sandbox)
    secrets_path = sandbox / SECRETS_FILE
    # Set here rather than by the starter: neither the job ad nor /proc/PID/environ shows them.
    os.environ.update(json.loads(secrets_path.read_text()))
    secrets_path.unlink()
    # At the end: an installed package of the site's own comes first.
    sys.path.append(str(sandbox / PACKAGE_FILE))
    try:
        import distributed  # noqa: F401  (whether it can be imported is the question)
    except ImportError as exc:
        say(
            f"{sys.executable} on {os.uname().nodename} has no {exc.name}: install dask and distributed "
            f"{config['versions'].get('distributed', '')} there, or set worker.container_image or worker.python"
        )
        return EXIT_MISSING
    here = {
        "python": ".".join(map(str, sys.version_info[:2])),
        "dask": version("dask"),
        "distributed": version("distributed"),
    }
    differences = [
        f"{name} {here[name]} on the worker, {wanted} on the flow's host"
        for name, wanted in config["versions"].items()
        if name in here and here[name] != wanted
    ]
    if differences:
        say(
            "versions differ: "
            + "; ".join(differences)
            + " (worker.python, worker.container_image choose the worker's)"
        )
        return EXIT_VERSIONS

    import asyncio

    return asyncio.run(_run_worker(config, sandbox))


async def _run_worker(config: dict[str, Any], sandbox: Path) -> int:
    import asyncio

    import dask
    from distributed import Worker

    from prefect_htcdask import gateway_comm

    gateway_comm.register()
    certificate, key = str(sandbox / CERTIFICATE_FILE), str(sandbox / KEY_FILE)
    # Every role: tasks open clients of their own, with the security that the configuration gives.
    for role in ("worker", "client", "scheduler"):
        dask.config.set({f"distributed.comm.tls.{role}.cert": certificate, f"distributed.comm.tls.{role}.key": key})
    dask.config.set({"distributed.comm.tls.ca-file": certificate, "distributed.comm.require-encryption": True})
    dask.config.set({"distributed.comm.timeouts.connect": "30s"})
    job_id, starts = job_identity()
    worker = Worker(
        config["scheduler_address"],
        protocol="tls",
        # The same form as condor.worker_job.worker_name, whose module need not be importable here.
        name=f"htcdask-{job_id}-{starts}",
        nthreads=config["nthreads"],
        memory_limit=config["memory_limit"] or 0,
        host=config.get("host"),
        local_directory=str(sandbox / "dask-scratch"),
        resources=config.get("resources") or None,
        preload=config.get("preload") or [],
        lifetime=config.get("lifetime"),
        lifetime_stagger=(config.get("lifetime") or 0) * 0.1 or None,
        death_timeout=config["death_timeout"],
    )
    leaving = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, leaving.set)
    told = asyncio.ensure_future(leaving.wait())
    joining = asyncio.ensure_future(_join(worker))
    await asyncio.wait([joining, told], return_when=asyncio.FIRST_COMPLETED)
    if not joining.done():
        # Removed while it still looks for its scheduler, which may be gone: there is nothing to hand back, and the
        # event loop would wait for the search to end.
        os._exit(0)
    try:
        await joining
    except Exception as exc:
        say(
            f"the worker on {os.uname().nodename} could not join the scheduler at "
            f"{config['scheduler_address']}: {type(exc).__name__}: {exc}"
        )
        raise
    finished = asyncio.ensure_future(_finished(worker))
    await asyncio.wait([finished, told], return_when=asyncio.FIRST_COMPLETED)
    if not finished.done():
        going = asyncio.ensure_future(leave(worker, config["vacate_time"]))
        # A scheduler that ends meanwhile closes the worker, and never answers its farewell.
        await asyncio.wait([finished, going], return_when=asyncio.FIRST_COMPLETED)
    # Not by way of the event loop's own end, which waits for the thread of a task that still runs.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


async def _join(worker: Any) -> None:
    await worker


async def _finished(worker: Any) -> None:
    """Wait until the worker has closed, or has been closing for a while: a running task holds it up for 30 s."""
    import asyncio

    from distributed import Status

    while worker.status not in (Status.closing, Status.closed, Status.failed):
        await asyncio.sleep(0.2)
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(worker.finished(), timeout=_CLOSING_TIME)


async def leave(worker: Any, vacate_time: float) -> None:
    """Hand tasks and results back to the scheduler, then close, within the job's vacate time in seconds.

    A worker that just closes makes the scheduler mark all its tasks suspicious, three of which are a KilledWorker;
    one removed as *expected* does not (distributed, `Scheduler.remove_worker`).
    """
    import asyncio

    deadline = time.monotonic() + vacate_time * 0.8
    try:
        await asyncio.wait_for(
            worker.scheduler.retire_workers(workers=[worker.address], close_workers=False, remove=True),
            timeout=vacate_time * 0.5,
        )
    except Exception as exc:  # the scheduler may be gone, or busy: leaving goes on in any case
        say(f"retirement did not end in time: {type(exc).__name__}: {exc}")
    try:
        await asyncio.wait_for(
            worker.scheduler.unregister(
                address=worker.address, expected=True, close=False, stimulus_id="htcdask-leave"
            ),
            timeout=2,
        )
    except Exception as exc:
        say(f"the scheduler did not take the worker's leave: {type(exc).__name__}: {exc}")
    try:
        await asyncio.wait_for(
            worker.close(timeout=2, executor_wait=False, nanny=False, reason="htcdask-leave"),
            timeout=max(1.0, deadline - time.monotonic()),
        )
    except Exception as exc:
        say(f"the worker did not close in time: {type(exc).__name__}: {exc}")


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of a task that is still running must not keep the job in the queue.
    os._exit(status) if "--worker" in sys.argv[1:] else sys.exit(status)
