"""The keeper: a process that owns the embedded pool and gateway, restarts what died, and stops when nobody uses them.

It runs alone in its session and is the reaper of all that its children leave behind, so that nothing outlives it
unnoticed. It has one thread: its children are told of its death by the kernel (PR_SET_PDEATHSIG), which means the
death of the thread that started them.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from filelock import Timeout

from prefect_htcdask.embedded.gateway_server import GatewayServer
from prefect_htcdask.embedded.launch import LaunchOrder
from prefect_htcdask.embedded.listeners import foreign_listener, listens
from prefect_htcdask.embedded.orphans import end_leftovers
from prefect_htcdask.embedded.pool_query import is_condor_setting, query_pool
from prefect_htcdask.embedded.ports import listening_socket
from prefect_htcdask.embedded.service import Service
from prefect_htcdask.embedded.state import Process, State, StateDirectory

PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
START_TIMEOUT = 300.0
"""Seconds for all to answer, on however busy a machine; what ends at start is noticed sooner."""
STOP_TIMEOUT = 60.0
"""Seconds for the daemons to end by themselves before they are killed."""
ORPHAN_TIMEOUT = 20.0
"""Seconds for the daemons of a dead condor_master to end by themselves."""
MOST_START_FAILURES = 3
MOST_MOVES = 5
"""Ports that are tried for the proxy, where others take them before it listens."""
TAKES_SOCKETS = "passed TCP socket from systemd"
"""What condor_master says of a listening socket that it was given (condor_master.V6/masterDaemon.cpp)."""
SHARED_PORT_STARTED = "condor_shared_port"

logger = logging.getLogger("prefect_htcdask.keeper")


class Keeper:
    """Starts, watches and stops the services of one state directory.

    Args:
        directory: the state directory, whose keeper lock the caller holds.
        order: what to start.
    """

    def __init__(self, directory: StateDirectory, order: LaunchOrder) -> None:
        self.directory = directory
        self.order = order
        self.services: list[Service] = []
        self.server = GatewayServer(directory.gateway, order.username, directory.password_file.read_text())
        self.state = State(
            phase="starting",
            message="starting",
            launch=order.id,
            keeper=Process.of(os.getpid()),
            username=order.username,
            gateway_address=self.server.url,
            proxy_address=self.server.proxy_address,
            versions=order.versions,
            idle_timeout=order.idle_timeout,
            idle_since=time.time(),
        )
        self.stopping = False
        self.moves = 0
        self.pool_address = ""
        self.pool_owners: set[int] = set()
        self._written = ""
        self._wakeup, wakeup_writer = os.pipe()
        os.set_blocking(self._wakeup, False)
        os.set_blocking(wakeup_writer, False)
        signal.set_wakeup_fd(wakeup_writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_stop)
        signal.signal(signal.SIGINT, self._on_stop)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def _on_stop(self, number: int, frame: object) -> None:
        self.stopping = True

    def run(self) -> int:
        """Start all, keep it until told to stop or idle, and stop it. Returns an exit status."""
        self.directory.write(self.state)
        try:
            self._start_guard()
            self._prepare()
            for service in self.services:
                service.start()
            self._await_readiness()
            self._keep()
            return 0
        except Exception as error:
            logger.exception("the embedded pool and gateway could not be kept")
            self._stop(phase="failed", message=str(error))
            return 1
        finally:
            if self.state.phase != "failed":
                self._stop(phase="stopped", message="")

    def _start_guard(self) -> None:
        """Start the process that cleans up should we be killed: it sees our end of its input vanish."""
        self._guard = subprocess.Popen(
            [sys.executable, "-m", "prefect_htcdask.embedded.guard", str(self.directory.path)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def _prepare(self) -> None:
        # Imported here, because it imports the bindings.
        from prefect_htcdask.embedded.pool import configure_pool, kernel_uids, socket_directory

        environment = {name: value for name, value in os.environ.items() if not is_condor_setting(name)}
        binaries = self.order.binaries
        if binaries is not None:
            # Of this start alone: it tells whether HTCondor takes the socket that it is given.
            log = self.directory.pool / "log" / "MasterLog"
            if log.exists():
                log.replace(log.with_suffix(".old"))
            sockets = socket_directory(self.directory.pool)
            listener = listening_socket()
            self.pool_owners = {os.geteuid(), *kernel_uids(self.order.identity)}
            self.pool_address = f"127.0.0.1:{listener.getsockname()[1]}"
            self.state.socket_directory = str(sockets) if sockets else None
            config = configure_pool(
                self.directory.pool,
                binaries,
                port=listener.getsockname()[1],
                cpus=self.order.cpus,
                memory=self.order.memory,
                sockets=sockets,
                identity=self.order.identity,
                owners=self.pool_owners,
            )
            self.state.condor_config = str(config)
            master = Service(
                "condor",
                [str(binaries.master), "-f"],
                signal.SIGQUIT,  # HTCondor's fast shutdown
                {**environment, "CONDOR_CONFIG": str(config)},
                self.directory.path / "condor_master.log",
                identity=self.order.identity,
                listener=listener,
            )
            self.services.append(master)
        self.server.configure()
        for name, command, given in (
            ("gateway", self.server.server_command, self.server.listener),
            ("proxy", self.server.proxy_command, None),
        ):
            log = self.directory.path / f"{name}.log"
            self.services.append(Service(name, command, signal.SIGTERM, environment, log, listener=given))

    def _await_readiness(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        self._until(self._gateway_answers, deadline, "the gateway does not answer")
        if self.state.condor_config is not None:
            config = self.state.condor_config
            self._until(self._pool_has_its_port, deadline, "the HTCondor pool does not start")
            self._until(lambda: query_pool(config, wait=1) is not None, deadline, "the HTCondor pool does not answer")
        if not self.stopping:
            self.state.phase, self.state.message = "running", ""
            self._record()
            logger.info("ready: gateway at %s", self.server.url)

    def _until(self, ready: Callable[[], bool], deadline: float, problem: str) -> None:
        while not self.stopping and not ready():
            for service in self.services:
                if service.failures >= MOST_START_FAILURES:
                    raise RuntimeError(f"{service.name} ended {service.failures} times at start: {_tail(service.log)}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{problem} within {START_TIMEOUT:.0f} s; see the logs in {self.directory.path}")
            self._tend(0.05)

    def _keep(self) -> None:
        period = min(15.0, max(0.5, self.order.idle_timeout / 4))
        next_look = time.monotonic() + period
        while not self.stopping:
            self._tend(2.0)
            if self.order.idle_timeout and time.monotonic() > next_look:
                if self._idle_for() >= self.order.idle_timeout and self._may_stop():
                    logger.info("nobody used the pool and gateway for %.0f s: stopping", self.order.idle_timeout)
                    return
                next_look = time.monotonic() + period

    def _tend(self, timeout: float) -> None:
        """Wait for a signal, reap what ended, restart what is due, and note who is there."""
        if select.select([self._wakeup], [], [], timeout)[0]:
            os.read(self._wakeup, 4096)
        self._reap()
        if not self.stopping:
            for service in self.services:
                if service.popen is None and time.monotonic() >= service.due and self._has_its_port(service):
                    service.start()
        self._record()

    def _gateway_answers(self) -> bool:
        """Whether server and proxy answer, and the proxy that does is our own child."""
        proxy = next(service for service in self.services if service.name == "proxy")
        if proxy.popen is None:
            return False
        return listens(self.server.proxy_address, proxy.popen.pid) and self.server.healthy()

    def _pool_has_its_port(self) -> bool:
        """Whether condor_master has taken the socket that it was given; else it has to bind the port itself.

        It knows how to with systemd's library at hand only.
        """
        master = next(service for service in self.services if service.name == "condor")
        if master.listener is None:
            if user := foreign_listener(self.pool_address, self.pool_owners):
                raise RuntimeError(f"port {self.pool_address} of HTCondor is listened to by user {user!r}, not by us")
            return True
        try:
            said = (self.directory.pool / "log" / "MasterLog").read_text(errors="replace")
        except FileNotFoundError:
            return False
        if TAKES_SOCKETS in said:
            return True
        if SHARED_PORT_STARTED in said:
            logger.info("this HTCondor takes no socket: it binds its port itself")
            master.listener.close()
            master.listener = None
            if master.popen is not None:
                # Its shared port daemon would try again only after a minute.
                master.popen.send_signal(master.end)
        return False

    def _has_its_port(self, service: Service) -> bool:
        """Whether a service that is due can have its port, or another one; at first the proxy's may change."""
        if service.name != "proxy":
            return True
        while (user := foreign_listener(self.server.proxy_address)) is not None:
            if self.state.phase == "starting" and self.moves < MOST_MOVES:
                logger.warning("%s is taken by user %r: choosing another port", self.server.proxy_address, user)
                self.moves += 1
                service.failures = 0
                self.server.move_proxy()
                self.state.gateway_address, self.state.proxy_address = self.server.url, self.server.proxy_address
                continue
            problem = f"port {self.server.proxy_address} of the gateway is listened to by user {user!r}, not by us"
            if self.state.phase == "starting":
                raise RuntimeError(f"{problem}, as {MOST_MOVES} ports were before it")
            if self.state.message != problem:
                logger.warning("%s; waiting until it is free again", problem)
            self.state.message = problem
            service.due = time.monotonic() + 1
            return False
        if self.state.phase == "running":
            self.state.message = ""
        return True

    def _reap(self) -> None:
        children = {service.popen.pid: service for service in self.services if service.popen is not None}
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            service = children.pop(ended.si_pid, None)
            if service is not None and service.popen is not None:
                service.ended(service.popen.wait())
                if service.name == "condor" and not self.stopping:
                    self._end_orphans(ended.si_pid)
            else:
                os.waitpid(ended.si_pid, 0)

    def _end_orphans(self, master: int) -> None:
        """End what a dead master's daemons and jobs left in our care, before a new master starts beside them.

        They are told from other descendants of ours by the mark that HTCondor puts into their environment.
        """
        mark = f"_CONDOR_ANCESTOR_{master}"
        deadline = time.monotonic() + ORPHAN_TIMEOUT
        number = signal.SIGQUIT
        asked: set[psutil.Process] = set()
        while True:
            self._reap()
            orphans = {process for process in psutil.Process().children(recursive=True) if _is_marked(process, mark)}
            if not orphans:
                return
            if time.monotonic() > deadline:
                number = signal.SIGKILL
                asked.clear()
            for process in orphans - asked:
                logger.info("ending %s (pid %d), whose condor_master died", process.name(), process.pid)
                _signal(process.pid, number)
            asked |= orphans
            time.sleep(0.05)

    def _record(self) -> None:
        """Write the state file, if there is anything new to say."""
        running = {s.name: p for s in self.services if s.popen is not None and (p := Process.of(s.popen.pid))}
        self.state.processes = running
        text = self.state.to_json()
        if text != self._written:
            self.directory.write(self.state)
            self._written = text

    @staticmethod
    def _descendants() -> list[int]:
        return sorted(process.pid for process in psutil.Process().children(recursive=True))

    def _idle_for(self) -> float:
        """Seconds since there was a job, a cluster or a caller."""
        last = max(self.state.idle_since, self.directory.last_use())
        if time.time() - last < self.order.idle_timeout:
            return time.time() - last
        try:
            busy = self.server.active_clusters() > 0
        except (OSError, ValueError):
            busy = True  # unknown: keep
        if not busy and self.state.condor_config is not None:
            pool = query_pool(self.state.condor_config)
            busy = pool is None or pool["jobs"]["total"] > 0
        if busy:
            self.state.idle_since = time.time()
            return 0.0
        return time.time() - last

    def _may_stop(self) -> bool:
        """Whether nobody has come since; from now on, who comes waits and starts a new keeper."""
        try:
            with self.directory.start_lock(timeout=0):
                if time.time() - self.directory.last_use() < self.order.idle_timeout:
                    return False
                self.state.phase = "stopping"
                self.directory.write(self.state)
                return True
        except TimeoutError:
            return False

    def _stop(self, phase: str, message: str) -> None:
        """End all services and their descendants, and say so in the state file."""
        self.stopping = True
        self.state.phase = "stopping"
        self.directory.write(self.state)
        for service in self.services:
            if service.popen is not None:
                logger.info("stopping %s (pid %d)", service.name, service.popen.pid)
                service.popen.send_signal(service.end)
        asked: set[int] = set()
        deadline = time.monotonic() + STOP_TIMEOUT
        while self._descendants():
            self._reap()
            late = time.monotonic() > deadline
            for process in psutil.Process().children():
                # What its parent left behind, such as a Dask scheduler, was inherited by us.
                if process.pid not in asked and not self._is_service(process.pid):
                    asked.add(process.pid)
                    _signal(process.pid, signal.SIGTERM)
            if late:
                for pid in self._descendants():
                    logger.warning("killing %d, which did not end within %.0f s", pid, STOP_TIMEOUT)
                    _signal(pid, signal.SIGKILL)
            if select.select([self._wakeup], [], [], 0.05)[0]:
                os.read(self._wakeup, 4096)
        self._forget()
        self.state.phase, self.state.message = phase, message
        self.state.processes = {}
        self.directory.write(self.state)
        logger.info("all stopped")

    def _is_service(self, pid: int) -> bool:
        return any(service.popen is not None and service.popen.pid == pid for service in self.services)

    def _forget(self) -> None:
        """Remove what must not come to life again: the job queue, sockets, the working directories of schedulers."""
        pool, gateway = self.directory.pool, self.directory.gateway
        for leftover in (pool / "spool", pool / "execute", gateway / "clusters"):
            shutil.rmtree(leftover, ignore_errors=True)
        if self.state.socket_directory:
            shutil.rmtree(self.state.socket_directory, ignore_errors=True)


def _is_marked(process: psutil.Process, mark: str) -> bool:
    try:
        return mark in process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _signal(pid: int, number: signal.Signals) -> None:
    """Signal a descendant. Its id cannot have been given to another: its reaper is us, or its own parent."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _tail(log: Path) -> str:
    return " ".join(log.read_text(errors="replace").strip().splitlines()[-3:])


def _become_daemon(log: Path) -> None:
    """Leave the caller's session, terminal and process tree; our output goes to `log`.

    What is left of the first process tells the caller our process id on its standard output.
    """
    daemon = os.fork()
    if daemon:
        print(daemon, flush=True)
        os._exit(0)
    os.setsid()
    os.chdir("/")
    os.umask(0o077)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="the state directory, with an order to launch in it")
    directory = StateDirectory(parser.parse_args().directory)
    _become_daemon(directory.log_file)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", handlers=[logging.StreamHandler()]
    )
    lock = directory.keeper_lock()
    try:
        lock.acquire()
    except Timeout:
        logger.error("another keeper holds %s: not starting twice", directory.path)
        return 1
    end_leftovers(directory)
    return Keeper(directory, LaunchOrder.read(directory)).run()


if __name__ == "__main__":
    sys.exit(main())
