"""What an HTCondor worker job runs: a guard process, and below it the Dask worker.

The file travels with the job and is run by the interpreter of the site or image, so its first half needs the standard
library only. The guard passes SIGTERM on, ends the worker where it takes more memory than the job asked for (a starter
that does not run as root enforces no limit), and says on stderr why a worker ended: the submitting side reads that.
The Dask worker leaves by handing its tasks and results back (`graceful_shutdown.py`), so that an eviction does not
count against a task. Where a task does not let its process listen, the guard takes its leave for it; and where it does
not let its process speak, the guard tells the scheduler that it lives.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

CONFIG_FILE = "worker_config.json"
SECRETS_FILE = "worker_secrets.json"
CERTIFICATE_FILE = "dask.crt"
KEY_FILE = "dask.pem"
PACKAGE_FILE = "prefect_htcdask.zip"
ADDRESS_FILE = "worker_address"
LEAVING_FILE = "worker_leaving"
BEAT_FILE = "worker_beat"
QUIET_FILE = "worker_quiet"
"""There while the submitting host has no room for what a worker writes: HTCondor evicts one whose stderr it cannot."""

START_LINE = "--- start {number} of HTCondor job {job} on {host} ---"
"""What a job that is started again writes first: it goes on in the file of the start before."""

EXIT_VERSIONS = 64
EXIT_MISSING = 69
EXIT_MEMORY = 75

_MEMORY_INTERVAL = 0.5

_BEAT = 5.0  # seconds between two signs that the worker's event loop runs
_SILENT = 20.0  # seconds without one, after which its guard speaks for it

# Bytes of stdout and stderr that are passed on as they come, of each. Of what follows only the last are, at the end.
_PASSED_ON = 2 * 2**20
_LAST = 64 * 2**10
_EMPTYING = 5.0  # seconds for what an ended worker has written

# Shares of the vacate time: after how long a worker that has not listened is spoken for, and when all has to be over.
_SILENCE = 0.25
_OVER = 0.9


def main() -> int:
    """Guard a worker, be one (`--worker`), speak for it (`--heartbeat`), or take its leave (`--deregister`).

    Returns the exit status of the job.
    """
    sandbox = Path(os.environ.get("_CONDOR_SCRATCH_DIR", "."))
    roles = {"--worker": run_worker, "--heartbeat": send_heartbeats, "--deregister": deregister}
    role = next((roles[word] for word in sys.argv[1:] if word in roles), None)
    if role is not None:
        return role(sandbox)
    with bounded_output(sandbox / QUIET_FILE):
        job, starts = job_identity()
        if starts > 1:
            line = START_LINE.format(number=starts, job=job, host=os.uname().nodename)
            print(line, file=sys.stderr, flush=True)
        return guard(sandbox)


@contextmanager
def bounded_output(quiet: Path) -> Iterator[None]:
    """Pass on so much of what this process and its children write: it fills the disk of the submitting host.

    Args:
        quiet: nothing is passed on while this file is there.
    """
    spouts = [Spout(number, quiet) for number in (sys.stdout.fileno(), sys.stderr.fileno())]
    try:
        yield
    finally:
        for spout in spouts:
            spout.finish()


class Spout:
    """Takes what is written to a descriptor of this process and its children from now on, and passes it on.

    Args:
        number: the descriptor.
        quiet: nothing is passed on while this file is there.
    """

    def __init__(self, number: int, quiet: Path) -> None:
        self._number = number
        self._quiet = quiet
        self._target = os.dup(number)
        self._source, end = os.pipe()
        os.dup2(end, number)
        os.close(end)
        self._passed = self._missing = 0
        self._last = bytearray()
        self._busy = threading.Lock()
        self._thread = threading.Thread(target=self._pump, daemon=True)
        self._thread.start()

    def _pump(self) -> None:
        while data := os.read(self._source, 2**16):
            with self._busy:
                self._take(data)

    def _take(self, data: bytes) -> None:
        if self._passed < _PASSED_ON and not self._quiet.exists():
            self._pass_last()
            self._passed += len(data)
            self._write(data)
            return
        self._last += data
        beyond = max(0, len(self._last) - _LAST)
        self._missing += beyond
        del self._last[:beyond]

    def _pass_last(self) -> None:
        if self._missing:
            self._write(f"\n[{self._missing:,} bytes are left out here]\n".encode())
        self._write(bytes(self._last))
        self._missing, self._last = 0, bytearray()

    def _write(self, data: bytes) -> None:
        with suppress(OSError):
            while data:
                data = data[os.write(self._target, data) :]

    def finish(self) -> None:
        """Pass on the last that was written, and let the descriptor be what it was."""
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(self._target, self._number)
        deadline = time.monotonic() + _EMPTYING
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._thread.join(0.1)
            # A process that the worker left behind may hold the other end for ever.
            if not select.select([self._source], [], [], 0)[0]:
                break
        with self._busy:
            if not self._quiet.exists():
                self._pass_last()


def guard(sandbox: Path) -> int:
    """Start the worker process in `sandbox`, watch its memory, pass signals on. Returns its exit status."""
    for name in (SECRETS_FILE, KEY_FILE):
        (sandbox / name).chmod(0o600)
    config = read_config(sandbox)
    child: subprocess.Popen[bytes] | None = None
    farewell: subprocess.Popen[bytes] | None = None
    heartbeats: subprocess.Popen[bytes] | None = None
    told_at: float | None = None

    def pass_on(signum: int, _frame: object) -> None:
        nonlocal told_at
        told_at = told_at or time.monotonic()
        if child is not None and child.poll() is None:
            child.send_signal(signal.SIGTERM)

    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, pass_on)
    child = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--worker"], cwd=sandbox)
    if told_at is not None:
        child.terminate()
    watch = MemoryWatch(int(config["memory_limit"]))
    vacate_time = float(config.get("vacate_time") or 20.0)
    while True:
        try:
            status = child.wait(timeout=_MEMORY_INTERVAL)
        except subprocess.TimeoutExpired:
            told_for = time.monotonic() - told_at if told_at is not None else 0.0
            if told_for > vacate_time * _SILENCE and farewell is None and not (sandbox / LEAVING_FILE).exists():
                # A task that keeps the interpreter's lock: the worker process can hand nothing back itself.
                farewell = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--deregister"], cwd=sandbox)
            if (heartbeats is None or heartbeats.poll() is not None) and is_silent(sandbox):
                heartbeats = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--heartbeat"], cwd=sandbox)
            if told_for > vacate_time * _OVER:
                end_family(child, farewell, heartbeats)
                say("the worker did not end within its vacate time and was ended")
                return 0
            if (used := watch.excess(child.pid)) is not None:
                end_family(child, heartbeats)
                say(
                    f"the worker used {used / 2**20:.0f} MiB of the {watch.limit / 2**20:.0f} MiB that its job asked "
                    "for and was ended; raise worker.memory, or give it fewer threads"
                )
                return EXIT_MEMORY
            continue
        end_family(heartbeats)
        if told_at is not None and status == -signal.SIGTERM:
            return 0  # told to leave before it had begun
        # A worker killed by a signal has told nobody why.
        if status < 0:
            say(f"the worker process was ended by signal {signal.Signals(-status).name}")
            return 128 - status
        return status


def say(text: str) -> None:
    """Write one line for the submitting side to find; in a worker that has joined, also to its flow run's log."""
    print(f"htcdask: {text}", file=sys.stderr, flush=True)
    if (relay := logging.getLogger("htcdask")).handlers:  # `prefect_htcdask.worker.api_log_handler`
        relay.warning("%s", text)


def be_quiet(sandbox: Path, quiet: bool) -> None:
    """Have this job pass on nothing of what it writes, or all of it again."""
    with suppress(OSError):
        (sandbox / QUIET_FILE).touch() if quiet else (sandbox / QUIET_FILE).unlink(missing_ok=True)


def is_silent(sandbox: Path) -> bool:
    """Whether the worker joined and its event loop has not run for a while: a task keeps the interpreter's lock."""
    try:
        return time.time() - (sandbox / BEAT_FILE).stat().st_mtime > _SILENT
    except FileNotFoundError:
        return False


def read_config(sandbox: Path) -> dict[str, Any]:
    """The worker's configuration, which travelled with the job."""
    config: dict[str, Any] = json.loads((sandbox / CONFIG_FILE).read_text())
    return config


class MemoryWatch:
    """Tells whether a process and its descendants take more memory than they may.

    Resident pages, which are cheap to ask for, are an upper bound: children that were forked share most of theirs.
    Above the limit the proportional ones are looked at, for which the kernel walks through the pages: for a tenth of
    the time at most, however large the processes are.

    Args:
        limit: bytes; 0 for none.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._due = 0.0

    def excess(self, pid: int) -> int | None:
        """What they use, in bytes, if that is above the limit."""
        began = time.monotonic()
        if not self.limit or began < self._due or memory_of(pid) <= self.limit:
            return None
        used = used_memory_of(pid)
        self._due = time.monotonic() + 9 * (time.monotonic() - began)
        return used if used > self.limit else None


def memory_of(pid: int) -> int:
    """Resident bytes of a process and its descendants; pages shared between them count once per process."""
    return sum(map(_resident, [pid, *descendants(pid)]))


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def used_memory_of(pid: int) -> int:
    """Bytes that a process and its descendants take from their host: each page once, and none of files.

    These are the proportional set sizes of anonymous and of shared memory. Pages of mapped files are the kernel's cache
    of these, which it drops where memory is short; the cgroup of a job is not ended for them either.

    Source: Linux, Documentation/filesystems/proc.rst, on smaps_rollup.
    """
    return sum(map(_used, [pid, *descendants(pid)]))


def _used(pid: int) -> int:
    told = _sizes(f"/proc/{pid}/smaps_rollup")
    if "Pss_Anon" in told:
        return told["Pss_Anon"] + told.get("Pss_Shmem", 0)
    # A process of another user does not show it, nor do kernels before 5.4: what is left are upper bounds.
    status = _sizes(f"/proc/{pid}/status")
    bounds = [told["Pss"]] if "Pss" in told else []
    if "RssAnon" in status:
        bounds.append(status["RssAnon"] + status.get("RssShmem", 0))
    return min(bounds) if bounds else _resident(pid)


def _sizes(path: str) -> dict[str, int]:
    """The sizes in a file of /proc, in bytes; none where it cannot be read."""
    try:
        lines = [line.split() for line in Path(path).read_text(errors="replace").splitlines()]
    except OSError:
        return {}
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3 and words[2] == "kB"}


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


def end_family(*members: subprocess.Popen[bytes] | None) -> None:
    """Kill processes with all their descendants, and reap them."""
    for member in filter(None, members):
        for pid in [*descendants(member.pid), member.pid]:
            _kill(pid)
        member.wait()


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
    use_package_of_flow(sandbox)
    gc.disable()  # what imports make is no garbage; until the worker, which imports Prefect as it starts, has joined
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


def use_package_of_flow(sandbox: Path) -> None:
    """Import prefect_htcdask from the job's own copy, which is the flow's version whatever a host or image has.

    An installed one of another version would not know the calls and modules that the flow names.
    """
    sys.path.insert(0, str(sandbox / PACKAGE_FILE))


def configure_dask(sandbox: Path) -> None:
    """Set Dask up for the gateway cluster's TLS and addresses."""
    import dask

    from prefect_htcdask.worker import gateway_comm

    gateway_comm.register()
    certificate, key = str(sandbox / CERTIFICATE_FILE), str(sandbox / KEY_FILE)
    # Every role: tasks open clients of their own, with the security that the configuration gives.
    for role in ("worker", "client", "scheduler"):
        dask.config.set({f"distributed.comm.tls.{role}.cert": certificate, f"distributed.comm.tls.{role}.key": key})
    dask.config.set({"distributed.comm.tls.ca-file": certificate, "distributed.comm.require-encryption": True})
    dask.config.set({"distributed.comm.timeouts.connect": "30s"})


async def _run_worker(config: dict[str, Any], sandbox: Path) -> int:
    import asyncio

    configure_dask(sandbox)
    from prefect_htcdask.worker import names, process

    process.log_without_colours()
    process.collect_seldom()
    process.tick_seldom()
    from prefect_htcdask.worker import graceful_shutdown

    job_id, starts = job_identity()
    worker = graceful_shutdown.HTCondorWorker(
        config["scheduler_address"],
        protocol="tls",
        name=names.worker_name(job_id, starts),
        nthreads=config["nthreads"],
        memory_limit=config["memory_limit"] or 0,
        host=config.get("host"),
        local_directory=str(sandbox / "dask-scratch"),
        resources=config.get("resources") or None,
        preload=config.get("preload") or [],
        death_timeout=config["death_timeout"],
    )
    worker.flow_run_id = config.get("flow_run_id")
    process.count_own_memory(worker)
    told, due = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def listen() -> None:
        (sandbox / LEAVING_FILE).touch()
        told.set()

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, listen)
    worker.stream_handlers[graceful_shutdown.DRAIN] = lambda **_: due.set()
    worker.stream_handlers[graceful_shutdown.QUIET] = lambda quiet, **_: be_quiet(sandbox, quiet)
    lifetime = config.get("lifetime")
    if lifetime:
        stagger = config.get("lifetime_stagger") or 0.0  # its default is resolved where the settings are
        loop.call_later(graceful_shutdown.drains_after(lifetime, stagger, job_id) - _seconds_up(), due.set)
    leaving = asyncio.ensure_future(told.wait())
    joining = asyncio.ensure_future(worker)
    await asyncio.wait([joining, leaving], return_when=asyncio.FIRST_COMPLETED)
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
    finally:
        gc.enable()
    (sandbox / ADDRESS_FILE).write_text(str(worker.address))
    beating = asyncio.ensure_future(_beat(sandbox))
    # A scheduler that ends meanwhile closes the worker, and never answers its farewell.
    over = asyncio.ensure_future(graceful_shutdown.finished(worker))
    draining = asyncio.ensure_future(_drain(worker, due, _STARTED + lifetime if lifetime else None))
    await asyncio.wait([over, leaving, draining], return_when=asyncio.FIRST_COMPLETED)
    if not over.done() and not draining.done():
        draining.cancel()
        going = asyncio.ensure_future(graceful_shutdown.leave(worker, say, config["vacate_time"]))
        await asyncio.wait([over, going], return_when=asyncio.FIRST_COMPLETED)
    beating.cancel()
    # Not by way of the event loop's own end, which waits for the thread of a task that still runs.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


_STARTED = time.monotonic()


def _seconds_up() -> float:
    return time.monotonic() - _STARTED


async def _beat(sandbox: Path) -> None:
    """Show the guard that the event loop runs."""
    import asyncio

    while True:
        with suppress(OSError):  # the scratch disk may be full
            (sandbox / BEAT_FILE).touch()
        await asyncio.sleep(_BEAT)


async def _drain(worker: Any, due: Any, until: float | None) -> None:
    """Wait until it is due, then drain; a worker that cannot drain stays until it is told to leave."""
    import asyncio

    from prefect_htcdask.worker import graceful_shutdown

    await due.wait()
    while True:
        try:
            return await graceful_shutdown.drain(worker, say, until)
        except Exception as exc:
            say(f"the worker could not drain: {type(exc).__name__}: {exc}; trying again")
            await asyncio.sleep(1.0)


def send_heartbeats(sandbox: Path) -> int:
    """Tell the scheduler that this job's worker lives, until it can say so itself. Returns the exit status."""
    import asyncio

    use_package_of_flow(sandbox)
    asyncio.run(_send_heartbeats(sandbox, (sandbox / ADDRESS_FILE).read_text()))
    return 0


async def _send_heartbeats(sandbox: Path, address: str) -> None:
    import asyncio

    async with _scheduler(sandbox) as scheduler:
        while is_silent(sandbox) and await asyncio.wait_for(scheduler.htcdask_alive(address=address), timeout=_SILENT):
            await asyncio.sleep(_BEAT)


def _scheduler(sandbox: Path) -> Any:
    """A connection of its own to the scheduler."""
    from distributed.core import rpc
    from distributed.security import Security

    configure_dask(sandbox)
    return rpc(read_config(sandbox)["scheduler_address"], connection_args=Security().get_connection_args("worker"))


def deregister(sandbox: Path) -> int:
    """Have the scheduler take the tasks of this job's worker back, which cannot listen. Returns the exit status."""
    import asyncio

    if not (sandbox / ADDRESS_FILE).exists():
        return 0  # it never joined
    use_package_of_flow(sandbox)
    asyncio.run(_deregister(sandbox, (sandbox / ADDRESS_FILE).read_text()))
    say("the worker did not listen: a task keeps its process busy; its tasks were handed back for it")
    return 0


async def _deregister(sandbox: Path, address: str) -> None:
    async with _scheduler(sandbox) as scheduler:
        await scheduler.unregister(address=address, expected=True, close=False, stimulus_id="htcdask-farewell")


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of a task that is still running must not keep the job in the queue.
    os._exit(status) if "--worker" in sys.argv[1:] else sys.exit(status)
