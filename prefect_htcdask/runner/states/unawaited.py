"""Task runs that a flow has not waited for, as it ends or is cancelled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from distributed import Client
from prefect.client.schemas.objects import State
from prefect.states import Cancelled

from prefect_htcdask.runner.futures.pending_result import PendingResult
from prefect_htcdask.worker.run_task import executing_keys


def executing(client: Client, timeout: float | None = None) -> frozenset[str]:
    """The keys of the Dask tasks that run just now.

    Args:
        client: of the workers.
        timeout: seconds for all of them to answer; `None`: for as long as it takes, such as for a task that keeps the
            interpreter's lock.

    Raises:
        TimeoutError: not all workers answered in time.
    """
    answers = client.run(executing_keys, on_error="ignore", callback_timeout=timeout)
    return frozenset(key for keys in answers.values() if isinstance(keys, (list, tuple, set)) for key in keys)


def cancel_or_wait(
    client: Client,
    pending: Iterable[PendingResult],
    goes_on: Callable[[], bool],
    give: Callable[[PendingResult, State[Any]], None],
    log: Callable[[str, str], None],
) -> None:
    """Cancel the task runs that have not started, and wait for those that run, as Prefect's own runners do.

    Args:
        client: of the Dask futures.
        pending: task runs that have not ended.
        goes_on: whether there is any use in waiting.
        give: takes the final state of a task run, for whoever waits for it in another thread.
        log: writes to the flow run's log; level and text.
    """
    keys = executing(client)
    waiting = [result for result in pending if result.key not in keys]
    running = [result for result in pending if result.key in keys]
    if waiting:
        log(
            "info",
            f"The flow has ended: {len(waiting)} task runs that it did not wait for and that have not started are "
            "cancelled",
        )
        futures = [result.dask_future for result in waiting]
        # Before they are cancelled: a future that is without a state then would be one of a lost task run.
        for result in waiting:
            give(result, Cancelled(message="The flow ended before the task run started"))
        client.cancel(futures, reason="the flow has ended")
    if running:
        log("info", f"Waiting for {len(running)} running task runs that the flow did not wait for")
    while any(result.is_pending() for result in running):
        if not goes_on() or client.status not in ("running", "connecting"):
            return
        time.sleep(0.05)
