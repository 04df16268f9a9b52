"""One child of the keeper: how it is started, and when again after it ended."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from prefect_htcdask.embedded import child

LOG_LIMIT = 10_000_000
"""Bytes of a child's log that are kept when it is started again, besides those of one older log."""
LONGEST_BACKOFF = 30.0
STEADY = 60.0
"""A child that ran this long (seconds) was all right: its next restart is immediate again."""

logger = logging.getLogger("prefect_htcdask.keeper")


@dataclass
class Service:
    """One child of the keeper.

    Attributes:
        name: for logs and the state file.
        command: what to run.
        end: the signal that ends it, sent by the kernel too when the keeper dies.
        environment: its environment.
        log: the file for its output.
        identity: as whom it runs: see `child`.
        listener: a listening socket that it is given at each start, or `None`. It stays ours: nobody else can take its
            port while the service is down.
    """

    name: str
    command: list[str]
    end: signal.Signals
    environment: dict[str, str]
    log: Path
    identity: str = "same"
    listener: socket.socket | None = None
    popen: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    failures: int = 0
    due: float = 0.0

    def start(self) -> None:
        if self.log.exists() and self.log.stat().st_size > LOG_LIMIT:
            self.log.replace(self.log.with_suffix(".log.old"))
        with open(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
            given = [self.listener.fileno()] if self.listener is not None else []
            launcher = [sys.executable, "-I", "-S", child.__file__, str(os.getpid()), self.end.name, self.identity]
            launcher.append(str(given[0]) if given else "none")
            self.popen = subprocess.Popen(
                [*launcher, *self.command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd="/",
                # A session of its own, as HTCondor's master and the gateway expect of a service manager.
                start_new_session=True,
                pass_fds=given,
            )
        self.started = time.monotonic()
        logger.info("started %s (pid %d)", self.name, self.popen.pid)

    def ended(self, status: int) -> None:
        """Note that the process ended, and plan its restart: later after each quick failure."""
        if time.monotonic() - self.started > STEADY:
            self.failures = 0
        delay = 0.0 if self.failures == 0 else min(0.5 * 2**self.failures, LONGEST_BACKOFF)
        self.failures += 1
        self.popen = None
        self.due = time.monotonic() + delay
        logger.info("%s ended with status %d; if it is wanted, it is started again in %.1f s", self.name, status, delay)
