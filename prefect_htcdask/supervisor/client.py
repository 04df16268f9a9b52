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
from concurrent.futures import TimeoutError as FutureTimeoutError  # the built-in one only since Python 3.11
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from prefect_htcdask.supervisor.protocol import (
    CLOSE_TIMEOUT,
    GatewayAccess,
    Preflight,
    SupervisorConfig,
    encode,
    from_line,
    group_of,
    target_of,
    to_line,
)

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT = 300.0  # seconds, on however busy a machine; a supervisor that ends is noticed at once
_MAX_RESTARTS = 5
_AFTER_SUMMARY = 1.5  # seconds in which a supervisor that has told its summary mostly ends
_LONG_LIFE = 600.0  # a supervisor that lived this long in seconds was no failed start
# Names of environment variables whose values are nobody's business in a new process.
_SECRET_WORDS = ("KEY", "AUTH_STRING", "PASSWORD", "TOKEN", "SECRET")


class SupervisorError(RuntimeError):
    """The supervisor refused, failed, or did not answer. The message is meant for the user."""


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without Prefect's and our secrets, for a process that gets them by a pipe."""
    return {
        name: value
        for name, value in environment.items()
        if not (name.startswith(("PREFECT_", "JUPYTERHUB_", "DASK_")) and any(word in name for word in _SECRET_WORDS))
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
        self._plan: SupervisorConfig | None = None
        # Commands without a reply yet, with their lines: a new supervisor gets them again.
        self._pending: dict[int, tuple[Future[dict[str, Any]], bytes]] = {}
        self._next_id = 0
        self._has_plan = False
        self._checked: Future[None] = Future()
        self._ready: Future[None] = Future()
        self._closing = False
        self._detached = False
        self._restarts = 0
        self._started = 0.0
        self._refusal = ""
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
        self._has_plan = False
        self._started = time.monotonic()
        self._send(encode(self._preflight), process)
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

    def register_cluster(self, access: GatewayAccess) -> None:
        """Name a cluster that just starts, for the supervisor to stop should this process end before the hand-off."""
        with self._lock:
            self._send(encode(access))

    def hand_off(self, plan: SupervisorConfig, timeout: float = _ANSWER_TIMEOUT) -> None:
        """Give the supervisor its cluster and wait until it looks after it.

        Raises:
            SupervisorError: it could not, or another supervisor owns the cluster.
        """
        with self._lock:
            self._plan = plan
            self._send(encode((plan, False)))
            self._has_plan = True
        self._await(self._ready, timeout, "the supervisor did not take the cluster over")

    def request(self, op: str, timeout: float = _ANSWER_TIMEOUT, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its reply.

        Raises:
            SupervisorError: no reply in time, or the command was refused.
        """
        reply: Future[dict[str, Any]] = Future()
        with self._lock:
            if self.ended.is_set():
                raise SupervisorError(f"the supervisor has ended; its log is {self.log_path}")
            if op in ("scale", "adapt", "detach"):
                self._remember(op, arguments)
            self._next_id += 1
            number = self._next_id
            line = to_line({"op": op, "id": number, **arguments})
            self._pending[number] = reply, line
            if self._has_plan:
                self._send(line)
        try:
            answer = self._await(reply, timeout, f"the supervisor did not answer {op!r}")
        finally:
            self._pending.pop(number, None)
        if not answer.get("ok"):
            raise SupervisorError(str(answer.get("error")))
        if op == "hold":
            self._remember("scale", {"n": answer["fixed"], "group": answer["group"]})
        return answer

    def _remember(self, op: str, arguments: Mapping[str, Any]) -> None:
        """Keep a new target, for a supervisor that has to take over."""
        if self._plan is None:
            return
        if op == "detach":
            self._plan = dataclasses.replace(self._plan, detached=True)
            return
        with suppress(ValueError):  # which the supervisor refuses, and says so
            group = group_of(arguments, self._plan.groups)
            self._plan = self._plan.with_target(group, target_of({**arguments, "op": op}))

    def close(self, timeout: float = CLOSE_TIMEOUT) -> dict[str, Any]:
        """Have it remove all jobs and stop the cluster; idempotent, and quiet about a dead one.

        The process is waited for a moment only once it has told its summary: it may wait for jobs that are slow to
        leave. It goes on by itself, and the reading thread reaps it.

        Args:
            timeout: seconds to wait at most for the summary.

        Returns:
            the summary, empty where the process was gone.
        """
        deadline = time.monotonic() + timeout
        with self._lock:
            first, self._closing = not self._closing, True
        if first and not self.ended.is_set():
            if self._took_over():
                try:
                    self.request("close", timeout=timeout)
                except SupervisorError as exc:
                    logger.warning("%s; it goes on cleaning up by itself", exc)
                self._close_stdin()
            else:
                # It has nothing to clean up, and a forked child may keep the pipe from ending.
                self._close_stdin()
                self._process.terminate()
        left = max(0.1, deadline - time.monotonic())
        if not self.ended.wait(min(left, _AFTER_SUMMARY) if self.summary else left):
            logger.info("the supervisor (pid %d) still waits for the last jobs to leave", self._process.pid)
        return self.summary

    def detach(self) -> None:
        """Leave the supervisor to itself: the cluster is to live on without us."""
        self.request("detach")
        self._detached = True
        self._close_stdin()

    def keep_log_in(self, directory: Path) -> None:
        """Move the log into the cluster's directory, now that there is one; the process goes on writing it."""
        target = directory / "supervisor.log"
        if target.exists():  # of an earlier supervisor of the same cluster
            target = directory / self._log_path.name
        with self._lock, suppress(OSError):
            self._log_path.rename(target)
            self._log_path = target

    @property
    def log_path(self) -> Path:
        """The file that the process's stderr goes to."""
        return self._log_path

    def _took_over(self) -> bool:
        return self._ready.done() and self._ready.exception() is None

    def _close_stdin(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()

    def _send(self, line: bytes, process: subprocess.Popen[bytes] | None = None) -> None:
        stdin = (process or self._process).stdin
        assert stdin is not None
        try:
            stdin.write(line)
            stdin.flush()
        except (OSError, ValueError) as exc:
            # A supervisor that just died is replaced, with the newest target; it is no reason for the flow to fail.
            logger.info("the supervisor did not take a message: %s", exc)

    def _await(self, future: Future[Any], timeout: float, complaint: str) -> Any:
        try:
            return future.result(timeout)
        except FutureTimeoutError as exc:
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
            reply, _ = self._pending.get(message["id"]) or (None, b"")
            if reply is not None and not reply.done():
                reply.set_result(message)
        elif kind == "checked":
            self._settle(self._checked, None)
            with self._lock:
                if self._plan is not None and not self._has_plan:
                    self._take_up()
        elif kind == "ready":
            self._settle(self._ready, None)
        elif kind == "refused":
            self._refusal = message["text"]
            error = SupervisorError(self._refusal)
            self._settle(self._checked, error)
            self._settle(self._ready, error)
        elif kind == "target":
            # Another process's wish, which this one's plan must not undo in a successor.
            with self._lock:
                self._remember(message["op"], message)
                if self._plan is not None:
                    self._plan = dataclasses.replace(self._plan, request_seen=message["number"])
        else:
            if kind == "summary":
                self.summary = {name: value for name, value in message.items() if name != "kind"}
            self._on_message(message)

    def _take_up(self) -> None:
        """Give a new supervisor what the lost one had, and what that one left unanswered."""
        self._send(encode((self._plan, True)))
        self._has_plan = True
        for _, line in self._pending.values():
            self._send(line)
        if self._closing:
            self._send(to_line({"op": "close", "id": 0}))
            self._close_stdin()

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
        died = self._took_over() and not self.summary and not self._detached
        if died:
            if time.monotonic() - self._started > _LONG_LIFE:
                self._restarts = 0
            if self._restarts < _MAX_RESTARTS:
                # The first successor comes at once: workers wait for their lease to be renewed.
                time.sleep(2 ** (self._restarts - 1) if self._restarts else 0)
                logger.warning("the supervisor (pid %d) died; a new one takes over", process.pid)
                with self._lock:
                    self._restarts += 1
                    self._close_stdin()
                    self._process = self._start()
                return
        error = SupervisorError(f"the supervisor ended with status {process.returncode}; its log is {self._log_path}")
        self._settle(self._checked, error)
        self._settle(self._ready, error)
        with self._lock:
            self.ended.set()
            unanswered = [reply for reply, _ in self._pending.values() if not reply.done()]
        for reply in unanswered:
            reply.set_exception(error)
        if died:
            why = f" (the last one: {self._refusal})" if self._refusal else ""
            self._on_message(
                {
                    "kind": "failed",
                    "text": f"the supervisor died {self._restarts + 1} times{why}; see {self._log_path}",
                }
            )
