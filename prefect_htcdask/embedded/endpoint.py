"""Start, find and stop the embedded pool and gateway, from any process and from many at once."""

from __future__ import annotations

import os
import pwd
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from prefect_htcdask.embedded import child
from prefect_htcdask.embedded.condor_binaries import condor_binaries, installed
from prefect_htcdask.embedded.errors import EmbeddedError
from prefect_htcdask.embedded.gateway_server import check_installed, get_json, list_clusters, scheduler_logs
from prefect_htcdask.embedded.launch import LaunchOrder
from prefect_htcdask.embedded.orphans import end_leftovers
from prefect_htcdask.embedded.pool import pool_user
from prefect_htcdask.embedded.pool_query import query_pool
from prefect_htcdask.embedded.progress import Progress
from prefect_htcdask.embedded.state import Process, State, StateDirectory
from prefect_htcdask.utils.private_file import write_private

if TYPE_CHECKING:
    from prefect_htcdask.settings import EmbeddedSettings

DISTRIBUTIONS = (
    "prefect-htcdask", "prefect", "prefect-dask", "dask", "distributed", "dask-gateway", "dask-gateway-server",
    "htcondor"
)  # fmt: skip

WAYS_FOR_ROOT = ("namespace", "capability")
"""The ways of `child` for root to run HTCondor, best first."""

CONFIGURATIONS = ("/etc/condor/condor_config", "/usr/local/etc/condor_config", "~condor/condor_config")
"""Where HTCondor's programs look for their configuration, after the environment variable CONDOR_CONFIG."""


@dataclass(frozen=True)
class EmbeddedEndpoint:
    """How to reach the embedded pool and gateway.

    Attributes:
        directory: their state directory.
        gateway_address: URL of the gateway.
        proxy_address: host:port at which the gateway's proxy takes the schedulers' TLS connections.
        username: the only user whom the gateway accepts.
        password: that user's password.
        condor_config: configuration file of the pool (CONDOR_CONFIG); `None` where it is the machine's own.
        versions: of what is used, by name.
    """

    directory: Path
    gateway_address: str
    proxy_address: str
    username: str
    password: str = field(repr=False)
    condor_config: Path | None
    versions: dict[str, str]


def ensure_running(
    settings: EmbeddedSettings, *, timeout: float = 600, progress: Callable[[str], None] | None = None
) -> EmbeddedEndpoint:
    """Start what is not running of the embedded pool and gateway.

    It may be called again and again, and by many processes at once: one of them starts, the others wait.

    Args:
        settings: the group ``embedded`` of the settings.
        timeout: seconds to wait at most.
        progress: is told in a few words what is being done, where that takes time.

    Returns:
        how to reach them.

    Raises:
        EmbeddedError: where they cannot be had; the message says why and what to do.
    """
    if not settings.enabled:
        raise EmbeddedError(
            "no Dask Gateway is configured, and embedded.enabled is False; set gateway.address, or embedded.enabled "
            "to True"
        )
    tell = progress or (lambda message: None)
    directory = StateDirectory(settings.directory)
    directory.create()
    deadline = time.monotonic() + timeout
    try:
        with directory.start_lock(timeout):
            directory.touch()
            state = directory.read()
            if state is None or not state.alive or state.phase in ("stopping", "stopped", "failed"):
                _await_end(state, deadline)
                order, keeper = _launch(settings, directory, tell)
                state = _await_running(directory, order.id, keeper, deadline)
            elif state.phase != "running":
                # Its caller went away while it started.
                state = _await_running(directory, state.launch, state.keeper, deadline)
    except TimeoutError as error:
        raise EmbeddedError(
            f"the embedded pool and gateway were not ready within {timeout:.0f} s; see the logs in {directory.path}"
        ) from error
    return _endpoint(directory, state)


def find(settings: EmbeddedSettings) -> EmbeddedEndpoint | None:
    """How to reach the embedded pool and gateway if they run, and `None` if not: nothing is started."""
    directory = StateDirectory(settings.directory)
    state = directory.read()
    if state is None or not state.alive or state.phase != "running":
        return None
    return _endpoint(directory, state)


def scheduler_log_tail(settings: EmbeddedSettings, cluster_name: str, lines: int = 10) -> str:
    """The end of a cluster's scheduler's log; empty where there is none.

    Args:
        settings: the group ``embedded`` of the settings.
        cluster_name: the gateway's name of the cluster.
        lines: how many to give at most.
    """
    gateway = StateDirectory(settings.directory).gateway
    gone, there = scheduler_logs(gateway) / f"{cluster_name}.log", gateway / "clusters" / cluster_name / "logs"
    for log in (gone, there / "scheduler.log"):
        with suppress(OSError):
            return "\n".join(log.read_text(errors="replace").strip().splitlines()[-lines:])
    return ""


def stop(settings: EmbeddedSettings, *, timeout: float = 180) -> bool:
    """Stop the embedded pool and gateway, with all their jobs and clusters, and wait until all is gone.

    Args:
        settings: the group ``embedded`` of the settings.
        timeout: seconds to wait at most.

    Returns:
        whether anything was running.

    Raises:
        EmbeddedError: where something still runs after `timeout`.
    """
    directory = StateDirectory(settings.directory)
    state = directory.read()
    if state is None:
        return False
    if not state.alive:
        return end_leftovers(directory)
    assert state.keeper is not None
    state.keeper.send(signal.SIGTERM)
    deadline = time.monotonic() + timeout
    while state.keeper.alive:
        if time.monotonic() > deadline:
            raise EmbeddedError(
                f"the embedded pool's keeper (pid {state.keeper.pid}) did not end within {timeout:.0f} s; "
                f"see {directory.log_file}"
            )
        time.sleep(0.05)
    return True


def status(settings: EmbeddedSettings) -> dict[str, Any]:
    """What runs, where, and in which versions.

    Args:
        settings: the group ``embedded`` of the settings.

    Returns:
        a mapping fit for JSON: running (bool: all of it answers), phase, message, directory, keeper, processes, pool,
        gateway, idle, versions. `pool` and `gateway` are `None` where they do not answer.
    """
    directory = StateDirectory(settings.directory)
    state = directory.read()
    report: dict[str, Any] = {
        "running": False,
        "phase": "stopped",
        "message": "",
        "directory": str(directory.path),
        "keeper": None,
        "processes": {},
        "pool": None,
        "gateway": None,
        "idle": None,
        "versions": {**(state.versions if state else {}), **_versions()},
    }
    if state is None:
        return report
    if not state.alive:
        crashed = state.phase not in ("stopped", "failed")
        report["phase"] = "failed" if crashed else state.phase
        report["message"] = "the keeper was killed; the next start cleans up" if crashed else state.message
        return report
    assert state.keeper is not None
    report.update(phase=state.phase, message=state.message, keeper=state.keeper.pid)
    report["processes"] = {name: process.pid for name, process in state.processes.items()}
    if state.phase != "running":
        return report
    config = state.condor_config
    pool = query_pool(config)
    report["pool"] = pool and {"embedded": config is not None, "condor_config": config, **pool}
    report["gateway"] = _gateway_status(directory, state)
    if state.idle_timeout:
        since = max(state.idle_since, directory.last_use())
        report["idle"] = {"timeout": state.idle_timeout, "left": max(0.0, since + state.idle_timeout - time.time())}
    report["running"] = report["pool"] is not None and report["gateway"] is not None
    return report


def _gateway_status(directory: StateDirectory, state: State) -> dict[str, Any] | None:
    try:
        password = directory.password_file.read_text()
        return {
            "address": state.gateway_address,
            "proxy_address": state.proxy_address,
            "username": state.username,
            "version": get_json(f"{state.gateway_address}/api/version")["version"],
            "clusters": sorted(list_clusters(state.gateway_address, state.username, password)),
        }
    except (OSError, ValueError, KeyError):
        return None


def _versions() -> dict[str, str]:
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _await_end(state: State | None, deadline: float) -> None:
    """Wait for a keeper that is stopping."""
    while state is not None and state.keeper is not None and state.alive:
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.05)


def _launch(
    settings: EmbeddedSettings, directory: StateDirectory, tell: Progress
) -> tuple[LaunchOrder, Process | None]:
    """Start a keeper; the caller holds the start lock. Returns what it was told to start, and the keeper's process."""
    check_installed()
    identity = identity_for_daemons()
    binaries = None
    found = None
    if settings.use_configured_pool and _is_configured(directory):
        found = query_pool(None)
    versions = _versions()
    if found is None:
        binaries = condor_binaries(tell)
        versions["HTCondor"] = binaries.version
    else:
        versions["HTCondor"] = found["version"]
    tell("starting the Dask Gateway" if binaries is None else "starting the embedded HTCondor pool and Dask Gateway")
    order = LaunchOrder(
        id=secrets.token_hex(8),
        username=pwd.getpwuid(os.geteuid()).pw_name,
        idle_timeout=settings.idle_timeout,
        binaries=binaries,
        cpus=settings.slots,
        memory=settings.memory,
        identity=identity,
        versions=versions,
    )
    order.write(directory)
    write_private(directory.password_file, secrets.token_urlsafe(32))
    result = subprocess.run(
        [sys.executable, "-m", "prefect_htcdask.embedded.keeper", str(directory.path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        raise EmbeddedError(f"the embedded pool's keeper could not be started: {result.stderr.strip()[-500:]}")
    return order, Process.of(int(result.stdout))


def _is_configured(directory: StateDirectory) -> bool:
    """Whether HTCondor's own search would find a configuration on this machine, other than that of our own pool."""
    given = os.environ.get("CONDOR_CONFIG")
    if given is not None:
        return Path(given) != directory.pool / "condor_config"
    if installed() is not None:
        return True
    return any(os.path.exists(os.path.expanduser(path)) for path in CONFIGURATIONS)


def identity_for_daemons() -> str:
    """As whom HTCondor's daemons run: root, who may own no jobs, has to be someone else.

    Raises:
        EmbeddedError: where that cannot be.
    """
    if os.geteuid() != 0:
        return "same"
    user = pool_user()
    refused = []
    for way in WAYS_FOR_ROOT:
        identity = f"{way}:{user.pw_uid}:{user.pw_gid}"
        trial = [sys.executable, "-I", "-S", child.__file__, str(os.getpid()), "SIGKILL", identity, "none", "true"]
        result = subprocess.run(trial, capture_output=True, text=True)
        if result.returncode == 0:
            return identity
        refused.append(f"{way}: {result.stderr.strip()}")
    raise EmbeddedError(
        "HTCondor runs no jobs as root, and this machine lets root be no other user who can read root's files "
        f"({'; '.join(refused)}); run as an ordinary user, or allow user namespaces"
    )


def _await_running(directory: StateDirectory, launch: str, keeper: Process | None, deadline: float) -> State:
    """Wait until the keeper of order `launch` says that all is ready.

    Raises:
        EmbeddedError: where that cannot be; the message says why, if the keeper did.
        TimeoutError: after `deadline` of the monotonic clock.
    """
    while True:
        # Looked up before the state: a keeper that ends has written its last word.
        gone = keeper is None or not keeper.alive
        state = directory.read()
        ours = state is not None and state.launch == launch
        if state is not None and ours and state.phase == "running" and not gone:
            return state
        if gone or (state is not None and ours and state.phase in ("failed", "stopped")):
            message = state.message if state is not None and ours and state.message else "the keeper ended"
            if state is not None and not ours and state.keeper is not None and psutil.pid_exists(state.keeper.pid):
                # Its state does not read as alive, as after an update of this package.
                message = f"another keeper may still hold the directory; end it with: kill {state.keeper.pid}"
            raise EmbeddedError(
                f"the embedded pool and gateway could not be started: {message}; see the logs in {directory.path}"
            )
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)


def _endpoint(directory: StateDirectory, state: State) -> EmbeddedEndpoint:
    return EmbeddedEndpoint(
        directory=directory.path,
        gateway_address=state.gateway_address,
        proxy_address=state.proxy_address,
        username=state.username,
        password=directory.password_file.read_text(),
        condor_config=Path(state.condor_config) if state.condor_config else None,
        versions=state.versions,
    )
