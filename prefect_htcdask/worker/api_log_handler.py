"""A worker's own records, such as Dask's warnings, in the Prefect log of the flow run that the worker belongs to.

Few of them: thousands of workers may have the same to say. Nothing here waits for the API, and nothing can break the
worker: Prefect's own thread sends what is queued (`prefect.logging.handlers.APILogWorker`), and drops what it cannot.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable

from distributed import Worker
from prefect.logging.handlers import APILogHandler

from prefect_htcdask.worker.names import job_of_worker

LOGGERS = ("distributed", "htcdask")
"""Dask's, and that of the worker's start script (`worker.start.say`)."""

BURST = 10
INTERVAL = 30.0
"""A worker sends so many records at once, and then one each so many seconds."""

_LONGEST = 2_000  # characters of a record
_SECRETS = ("PREFECT_API_KEY", "PREFECT_API_AUTH_STRING")
_UNTOLD = ("Compute Failed",)
"""How records begin that hold arguments of tasks: those are the user's own, and the task run's state tells more."""


class Quota:
    """Lets through a burst and then a trickle, and counts the others (a token bucket)."""

    def __init__(self, burst: int = BURST, interval: float = INTERVAL) -> None:
        self._burst = burst
        self._interval = interval
        self._left = float(burst)
        self._last: float | None = None
        self._dropped = 0

    def take(self, now: float) -> int | None:
        """Ask for one more at a time (monotonic seconds).

        Returns:
            how many were not let through since the last one; `None` where this one is not let through either.
        """
        gained = (now - self._last) / self._interval if self._last is not None else 0.0
        self._left, self._last = min(float(self._burst), self._left + gained), now
        if self._left < 1:
            self._dropped += 1
            return None
        self._left -= 1
        dropped, self._dropped = self._dropped, 0
        return dropped


class FlowRunLog(logging.Handler):
    """Sends records of WARNING and above to the Prefect API as the flow run's, tagged with where they come from.

    Args:
        flow_run_id: the flow run.
        origin: who says it, such as ``HTCondor job 12.0 on node7``.
        secrets: words that are blotted out.
    """

    def __init__(self, flow_run_id: str, origin: str, secrets: Iterable[str] = ()) -> None:
        super().__init__(logging.WARNING)
        self._flow_run_id = flow_run_id
        self._origin = origin
        self._secrets = [secret for secret in secrets if secret]
        self._quota = Quota()
        self._sender = APILogHandler()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record; one that cannot be is dropped."""
        try:
            text = record.getMessage()
            if text.lstrip().startswith(_UNTOLD):
                return
            dropped = self._quota.take(time.monotonic())
            if dropped is None:
                return
            more = f" ({dropped} more before were not sent; the worker's own log has them)" if dropped else ""
            told = logging.makeLogRecord(
                {
                    "name": record.name,
                    "levelno": record.levelno,
                    "levelname": record.levelname,
                    "created": record.created,
                    "msg": f"{self._origin}: {self._blotted(text)[:_LONGEST]}{more}",
                    "flow_run_id": self._flow_run_id,
                }
            )
            self._sender.emit(told)
        except Exception:  # a log is no reason for a worker to fail
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing: stderr has the record itself."""

    def _blotted(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def relay(worker: Worker, flow_run_id: str) -> FlowRunLog | None:
    """Have a worker's records sent to its flow run's log; returns the handler, or `None` where it is no job of ours.

    Args:
        worker: the worker.
        flow_run_id: the flow run that its job belongs to.
    """
    job = job_of_worker(worker.name)
    if job is None:
        return None
    secrets = (os.environ.get(name, "") for name in _SECRETS)
    handler = FlowRunLog(flow_run_id, f"HTCondor job {job} on {os.uname().nodename}", secrets)
    for name in LOGGERS:
        logging.getLogger(name).addHandler(handler)
    return handler
