"""A real pool with users of its own: each proves by a token who they are, and none but the operator may do all."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prefect_htcdask.embedded import EmbeddedEndpoint, ensure_running, stop
from prefect_htcdask.embedded.condor_binaries import condor_binaries
from prefect_htcdask.settings import ENV_PREFIX, EmbeddedSettings
from tests.support.waiting import wait_until

_DAEMONS = """
# Whoever has a token of this pool is one of its users. The one whom the daemons run as stays the queue's super user.
SEC_DEFAULT_AUTHENTICATION_METHODS = FS, IDTOKENS
SEC_TOKEN_POOL_SIGNING_KEY_FILE = {key}
TRUST_DOMAIN = localhost
ALLOW_READ = *@localhost
ALLOW_WRITE = *@localhost
"""

_CLIENT = """
include : {pool}
SEC_CLIENT_AUTHENTICATION_METHODS = IDTOKENS
SEC_TOKEN_DIRECTORY = {tokens}
SEC_TOKEN_SYSTEM_DIRECTORY = {tokens}
"""


@dataclass(frozen=True)
class PoolUser:
    """One of the pool's users.

    Attributes:
        name: as the schedd knows them, without its domain.
        config_file: HTCondor configuration that finds their token.
    """

    name: str
    config_file: Path

    @property
    def environment(self) -> dict[str, str]:
        """Has the code under test be this user, of a pool that is configured."""
        return {f"{ENV_PREFIX}CONDOR_CONFIG_FILE": str(self.config_file)}

    def condor(self, *command: str) -> str:
        """Run one of HTCondor's commands, or python with its bindings, as this user."""
        done = subprocess.run(
            command, env=_environment(self.config_file), capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, directory: Path, **attributes: str) -> str:
        """`condor_submit` of one job that waits on hold, with further attributes in its ad; returns its id.

        Args:
            directory: for the submit file.
            attributes: ClassAd expressions, such as a string with its quotes.
        """
        lines = ["executable = /bin/true", "transfer_executable = false", "hold = true", f"initialdir = {directory}"]
        lines += [f"+{name} = {value}" for name, value in attributes.items()]
        path = directory / f"{self.name}.sub"
        path.write_text("\n".join([*lines, "queue", ""]))
        return self.condor("condor_submit", "-terse", str(path)).split(" - ")[0].strip()


@dataclass(frozen=True)
class SharedPool:
    """A pool and gateway of their own, with two users.

    Attributes:
        settings: where they are.
        endpoint: pool and gateway.
        anne: whose flows run.
        mallory: who means them harm.
    """

    settings: EmbeddedSettings
    endpoint: EmbeddedEndpoint
    anne: PoolUser
    mallory: PoolUser


def _environment(config: Path) -> dict[str, str]:
    release = condor_binaries(lambda _text: None).release
    path = f"{release / 'bin'}:{release / 'sbin'}:{os.environ['PATH']}"
    return {**os.environ, "CONDOR_CONFIG": str(config), "PATH": path}


@contextmanager
def shared_pool(directory: Path) -> Iterator[SharedPool]:
    """A pool and gateway below a directory, while the block lasts."""
    settings = EmbeddedSettings(directory=str(directory / "pool"), idle_timeout=900, use_configured_pool=False)
    endpoint = ensure_running(settings)
    try:
        assert endpoint.condor_config is not None
        operator = PoolUser("operator", endpoint.condor_config)
        # The collector made it as it started.
        key = endpoint.condor_config.parent / "passwords.d" / "POOL"
        with endpoint.condor_config.open("a") as config:
            config.write(_DAEMONS.format(key=key))
        operator.condor("condor_reconfig")
        users = []
        for name in ("anne", "mallory"):
            tokens = directory / name
            tokens.mkdir(mode=0o700)
            token = operator.condor("condor_token_create", "-identity", f"{name}@localhost", "-key", "POOL")
            (tokens / "token").touch(mode=0o600)
            (tokens / "token").write_text(token)
            (directory / f"{name}.config").write_text(_CLIENT.format(pool=endpoint.condor_config, tokens=tokens))
            users.append(PoolUser(name, directory / f"{name}.config"))
        for user in users:
            wait_until(lambda user=user: _is_let_in(user), 30, f"{user.name} is let in")
        yield SharedPool(settings, endpoint, *users)
    finally:
        stop(settings)


def _is_let_in(user: PoolUser) -> bool:
    command = ["condor_ping", "-type", "schedd", "WRITE"]
    done = subprocess.run(command, env=_environment(user.config_file), capture_output=True, timeout=60, check=False)
    return done.returncode == 0
