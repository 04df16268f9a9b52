"""What the keeper and its callers know of each other: one directory, mode 0700, with a state file in it."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout

from prefect_htcdask.embedded.errors import EmbeddedError
from prefect_htcdask.utils.private_file import write_private

APPLICATION = "prefect-htcdask"


@dataclass(frozen=True)
class Process:
    """A process, told from a later one with the same id by its start time.

    Attributes:
        pid: process id.
        started: start time in clock ticks after boot, field 22 of proc_pid_stat(5).
        boot: the kernel's id of this boot.
    """

    pid: int
    started: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The living process with this id, or `None` where there is none (a zombie counts as none)."""
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return None
        # The command's name, in parentheses, may hold spaces and parentheses itself.
        fields = text[text.rindex(")") + 2 :].split()
        if fields[0] in "ZX":
            return None
        return cls(pid, int(fields[19]), _boot_id())

    @property
    def alive(self) -> bool:
        return Process.of(self.pid) == self

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if this very process still lives."""
        if not self.alive:
            return
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass
class State:
    """What the keeper says of itself, in ``state.json``.

    Attributes:
        phase: "starting", "running", "failed", "stopping" or "stopped".
        message: while starting, what is being done; when failed, what is wrong and what to do.
        launch: the id of the order that the keeper was started with.
        keeper: the keeper's own process.
        processes: its children by name: condor, gateway, proxy.
        gateway_address: URL of the gateway.
        proxy_address: host:port of the schedulers' TLS connections.
        username: the one user whom the gateway accepts.
        condor_config: configuration file of the embedded pool; `None` where the machine's own pool is used.
        versions: of HTCondor, bindings, Dask, Prefect and so on.
        socket_directory: where HTCondor's sockets are, when the state directory's path is too long for them.
        idle_timeout: seconds without jobs and clusters after which the keeper stops; 0: never.
        idle_since: when the last job or cluster was seen, in seconds since the epoch.
    """

    phase: str
    message: str = ""
    launch: str = ""
    keeper: Process | None = None
    processes: dict[str, Process] = field(default_factory=dict)
    gateway_address: str = ""
    proxy_address: str = ""
    username: str = ""
    condor_config: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    socket_directory: str | None = None
    idle_timeout: float = 0.0
    idle_since: float = 0.0

    @property
    def alive(self) -> bool:
        """Whether the keeper that wrote this still runs."""
        return self.keeper is not None and self.keeper.alive

    @classmethod
    def from_json(cls, text: str) -> State:
        raw: dict[str, Any] = json.loads(text)
        keeper = raw.pop("keeper")
        return cls(
            keeper=Process(**keeper) if keeper else None,
            processes={name: Process(**value) for name, value in raw.pop("processes").items()},
            **raw,
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


class StateDirectory:
    """The files of one embedded pool and gateway.

    Args:
        path: the directory; `None` for the user's own state directory, one for each host, since a home directory may
            be shared between hosts.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        if path is None:
            default = platformdirs.user_state_path(APPLICATION) / "embedded" / socket.gethostname()
            self.path = default
        else:
            self.path = Path(path).expanduser().absolute()
        self.mark_file = self.path / ".htcdask-embedded"
        self.state_file = self.path / "state.json"
        self.launch_file = self.path / "launch.json"
        self.password_file = self.path / "gateway-password"
        self.used_file = self.path / "used"
        self.log_file = self.path / "keeper.log"
        self.pool = self.path / "condor"
        self.gateway = self.path / "gateway"

    def create(self) -> None:
        """Make the directory, for its user only.

        Raises:
            EmbeddedError: where that cannot be done, the directory is someone else's, or other files are in it: a pool
                that stops deletes its queue and its working directories there.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            if self.path.stat().st_uid != os.geteuid():
                raise PermissionError(f"it belongs to user id {self.path.stat().st_uid}")
            names = os.listdir(self.path)
            if names and self.mark_file.name not in names and self.read() is None:
                raise FileExistsError(f"it holds other files, {sorted(names)[0]} among them")
            self.path.chmod(0o700)
            self.mark_file.touch(mode=0o600)
        except OSError as error:
            raise EmbeddedError(
                f"the state directory {self.path} cannot be used ({error}); "
                "set embedded.directory to a directory of your own"
            ) from error

    def read(self) -> State | None:
        """The last state written, or `None` where there is none that can be read."""
        try:
            return State.from_json(self.state_file.read_text())
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError):
            # Torn by a power loss, or written by another version: as good as none.
            return None

    def write(self, state: State) -> None:
        write_private(self.state_file, state.to_json())

    def touch(self) -> None:
        """Note that somebody uses the pool now, so that the keeper does not stop just then."""
        self.used_file.touch(mode=0o600)

    def last_use(self) -> float:
        """When `touch` was last called, in seconds since the epoch; 0 for never."""
        try:
            return self.used_file.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    @contextmanager
    def start_lock(self, timeout: float) -> Iterator[None]:
        """Held while a keeper is being started, or decides to stop for idleness.

        Raises:
            TimeoutError: where it cannot be had within `timeout` seconds.
        """
        lock = FileLock(self.path / "start.lock", timeout=timeout)
        try:
            lock.acquire()
        except Timeout as error:
            raise TimeoutError(str(error)) from error
        try:
            yield
        finally:
            lock.release()

    def keeper_lock(self) -> FileLock:
        """Held by the keeper for its life."""
        return FileLock(self.path / "keeper.lock", timeout=0)
