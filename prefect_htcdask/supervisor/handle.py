"""The flow side of a supervisor: starts the process, talks to it, reaps it, and starts a new one if it dies."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from .protocol import CLOSE_TIMEOUT, HandOff, Preflight, encode, from_line, to_line

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT = 60.0
_MAX_RESTARTS = 5
# Names of environment variables whose values are nobody's business in a new process.
_SECRET_WORDS = ("KEY", "AUTH_STRING", "PASSWORD", "TOKEN", "SECRET")


class SupervisorError(RuntimeError):
    """The supervisor refused, failed, or did not answer. The message is meant for the user."""


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without Prefect's and our secrets, for a process that gets them by a pipe."""
    return {
        name: value
        for name, value in environment.items()
        if not (name.startswith(("PREFECT_", "JUPYTERHUB_")) and any(word in name for word in _SECRET_WORDS))
    }


class SupervisorHandle:
    """A supervisor process, from preflight to its end. Thread-safe.

    Args:
        preflight: what it checks first.
        log_path: file that takes the process's stderr, mode 0600.
        on_message: called from a thread of the handle with each message that is no reply.
    """

    def __init__(self, preflight: Preflight, log_path: Path, on_message: Callable[[dict[str, Any]], None]) -> None:
        self._preflight = preflight
        self._log_path = log_path
        self._on_message = on_message
        self._lock = threading.RLock()
        self._plan: HandOff | None = None
        self._replies: dict[int, Future[dict[str, Any]]] = {}
        self._next_id = 0
        self._checked: Future[None] = Future()
        self._ready: Future[None] = Future()
        self._closing = False
        self._restarts = 0
        self.summary: dict[str, Any] = {}
        self.ended = threading.Event()
        self._process = self._start()

    @property
    def pid(self) -> int:
        """Process id of the supervisor that runs now."""
        return self._process.pid

    def _start(self) -> subprocess.Popen[bytes]:
        self._log_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self._log_path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
        try:
            # exec, never fork or multiprocessing; a session of its own, since Prefect may kill the flow's process
            # group and Ctrl-C reaches all of it.
            process = subprocess.Popen(
                [sys.executable, "-m", "prefect_htcdask.supervisor"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=descriptor,
                start_new_session=True,
                env=clean_environment(os.environ),
            )
        finally:
            os.close(descriptor)
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(encode(self._preflight))
        process.stdin.flush()
        threading.Thread(
            target=self._read, args=(process, process.stdout), name="htcdask-supervisor", daemon=True
        ).start()
        return process

    # Calls

    def wait_checked(self, timeout: float = _ANSWER_TIMEOUT) -> None:
        """Wait for the preflight.

        Raises:
            SupervisorError: it failed; the message names the setting and the remedy.
        """
        self._await(self._checked, timeout, "the supervisor did not finish its checks")

    def hand_off(self, plan: HandOff, timeout: float = _ANSWER_TIMEOUT) -> None:
        """Give the supervisor its cluster and wait until it looks after it.

        Raises:
            SupervisorError: it could not, or another supervisor owns the cluster.
        """
        with self._lock:
            self._plan = plan
            self._send(encode((plan, False)))
        self._await(self._ready, timeout, "the supervisor did not take the cluster over")

    def request(self, op: str, timeout: float = _ANSWER_TIMEOUT, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its reply.

        Raises:
            SupervisorError: no reply in time, or the command was refused.
        """
        reply: Future[dict[str, Any]] = Future()
        with self._lock:
            self._remember(op, arguments)
            self._next_id += 1
            number = self._next_id
            self._replies[number] = reply
            self._send(to_line({"op": op, "id": number, **arguments}))
        try:
            answer = self._await(reply, timeout, f"the supervisor did not answer {op!r}")
        finally:
            self._replies.pop(number, None)
        if not answer.get("ok"):
            raise SupervisorError(str(answer.get("error")))
        return answer

    def _remember(self, op: str, arguments: Mapping[str, Any]) -> None:
        """Keep a new target, for a supervisor that has to take over."""
        if self._plan is None:
            return
        if op == "scale":
            self._plan = dataclasses.replace(self._plan, adaptive=False, fixed=arguments["n"])
        elif op == "adapt":
            self._plan = dataclasses.replace(
                self._plan, adaptive=True, minimum=arguments["minimum"], maximum=arguments["maximum"]
            )
        elif op == "detach":
            self._plan = dataclasses.replace(self._plan, detached=True)

    def close(self, timeout: float = CLOSE_TIMEOUT) -> dict[str, Any]:
        """Have it remove all jobs and stop the cluster, then reap it; idempotent, and quiet about a dead one.

        Args:
            timeout: seconds to wait at most; the process goes on cleaning up by itself after that.

        Returns:
            the summary, empty where the process was gone.
        """
        deadline = time.monotonic() + timeout
        with self._lock:
            first, self._closing = not self._closing, True
        if first and self._process.poll() is None:
            if self._ready.done() and self._ready.exception() is None:
                try:
                    self.request("close", timeout=timeout)
                except SupervisorError as exc:
                    logger.warning("%s; it goes on cleaning up by itself", exc)
            self._close_stdin()
        try:
            self._process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            logger.warning("the supervisor (pid %d) still waits for the last jobs to leave", self._process.pid)
        self.ended.wait(1)
        return self.summary

    def detach(self) -> None:
        """Leave the supervisor to itself: the cluster is to live on without us."""
        self.request("detach")
        self._closing = True

    def _close_stdin(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def _send(self, line: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except (OSError, ValueError) as exc:
            # A supervisor that just died is replaced, with the newest target; it is no reason for the flow to fail.
            logger.info("the supervisor did not take a message: %s", exc)

    def _await(self, future: Future[Any], timeout: float, complaint: str) -> Any:
        try:
            return future.result(timeout)
        except TimeoutError as exc:
            raise SupervisorError(f"{complaint} within {timeout:.0f} s; its log is {self._log_path}") from exc

    # The reading thread

    def _read(self, process: subprocess.Popen[bytes], stdout: IO[bytes]) -> None:
        for line in stdout:
            try:
                self._take(from_line(line))
            except Exception:
                logger.exception("a message of the supervisor could not be taken")
        process.wait()
        stdout.close()
        self._after_end(process)

    def _take(self, message: dict[str, Any]) -> None:
        kind = message.get("kind")
        if kind == "reply":
            reply = self._replies.get(message["id"])
            if reply is not None and not reply.done():
                reply.set_result(message)
        elif kind == "checked":
            self._settle(self._checked, None)
            with self._lock:
                if self._plan is not None and self._restarts:
                    self._send(encode((self._plan, True)))
        elif kind == "ready":
            self._settle(self._ready, None)
        elif kind == "refused":
            error = SupervisorError(message["text"])
            self._settle(self._checked, error)
            self._settle(self._ready, error)
        else:
            if kind == "summary":
                self.summary = {name: value for name, value in message.items() if name != "kind"}
            self._on_message(message)

    @staticmethod
    def _settle(future: Future[None], error: Exception | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    def _after_end(self, process: subprocess.Popen[bytes]) -> None:
        """A supervisor ended: that is the end of it, or it died and a new one takes its place."""
        with self._lock:
            died = not self._closing and not self.summary and self._plan is not None and self._ready.done()
            if died and self._restarts < _MAX_RESTARTS:
                self._restarts += 1
                logger.warning("the supervisor (pid %d) died; a new one takes over", process.pid)
                self._process = self._start()
                return
        error = SupervisorError(f"the supervisor ended with status {process.returncode}; its log is {self._log_path}")
        self._settle(self._checked, error)
        self._settle(self._ready, error)
        for reply in list(self._replies.values()):
            if not reply.done():
                reply.set_exception(error)
        self.ended.set()
        if died:
            self._on_message(
                {
                    "kind": "failed",
                    "text": f"the supervisor died {self._restarts + 1} times; see {self._log_path}",
                }
            )
