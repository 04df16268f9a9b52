"""The last state of a flow run that was cancelled where no Prefect process stands beside it.

A cancel through the API asks for it by the state Cancelling; the worker or runner that stops the flow's process then
says Cancelled. Beside a plain ``python flow.py`` there is none, Prefect's engine accepts nothing else of the process
than what it proposes itself, which is refused, and the flow run would be Cancelling for ever.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from uuid import UUID

GRACE = 2.0
"""Seconds that the flow's engine has for its own last word: a flow run may still go from Cancelled to Failed."""

ATTEMPTS = 4
PAUSE = 3.0
TIMEOUT = 5.0
"""Seconds that a request may take: whoever cancelled waits for the process's end, though the API be away."""

logger = logging.getLogger("prefect.task_runner.htcdask")


def end_cancelling(flow_run_id: UUID, grace: float = GRACE) -> threading.Thread:
    """Have a flow run Cancelled that is Cancelling still in a while; the process does not end before."""
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(_end, flow_run_id, grace), name="htcdask-cancelled")
    thread.start()
    return thread


def _end(flow_run_id: UUID, grace: float) -> None:
    for attempt in range(ATTEMPTS):
        time.sleep(PAUSE if attempt else grace)
        try:
            return _end_now(flow_run_id)
        except Exception as exc:
            if attempt == ATTEMPTS - 1:
                logger.warning("Flow run %s was cancelled, but Prefect could not be told: %s", flow_run_id, exc)


def _end_now(flow_run_id: UUID) -> None:
    from prefect.states import Cancelled

    from prefect_htcdask.utils.prefect_client import open_client

    with open_client(TIMEOUT) as client:
        state = client.read_flow_run(flow_run_id).state
        if state is not None and state.is_cancelling():
            message = "Cancelled: its task runs were cancelled and its workers removed"
            client.set_flow_run_state(flow_run_id, Cancelled(message=message), force=True)
