"""The flow's side of `rerun`: a worker that is given a task run again asks here what is known of it.

The flow's process may hold the task run's final state: it was collected, and then its worker was lost while another
task still needed it. Then the state is given back, and nothing runs again. And it knows why the lost worker's job
ended.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import cloudpickle
from distributed import Client

from prefect_htcdask.runner.futures.crash_reasons import JobOutcomes
from prefect_htcdask.runner.states.ended_task_runs import EndedTaskRuns
from prefect_htcdask.scheduler.worker_loss import WORKER_LOST
from prefect_htcdask.worker.metadata_cache import METADATA_ROOT
from prefect_htcdask.worker.rerun import TOPIC

LIMIT = 1024**3
"""States larger than this, in bytes, are not given back; others pass the scheduler, as all that is collected does."""

logger = logging.getLogger("prefect.task_runner.htcdask")


class ResultRecovery:
    """Answers the questions of one live run's workers.

    Args:
        client: the live run's client.
        run_key: the live run's id.
        final_state: finds the final state of a Dask key, where this process has it.
        job_outcomes: what is known of the jobs.
        log: writes to the flow run's log; level and text.
        ended_task_runs: is told when a worker has vanished.
    """

    def __init__(
        self,
        client: Client,
        run_key: str,
        final_state: Callable[[str], Any | None],
        job_outcomes: JobOutcomes,
        log: Callable[[str, str], None],
        ended_task_runs: EndedTaskRuns,
    ) -> None:
        self._client = client
        self._run_key = run_key
        self._final_state = final_state
        self._fates = job_outcomes
        self._log = log
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="htcdask-recall")
        client.subscribe_topic(f"{TOPIC}-{run_key}", self._heard)
        client.subscribe_topic(WORKER_LOST, lambda _event: ended_task_runs.worker_lost())

    def close(self) -> None:
        """Answer no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _heard(self, event: tuple[float, dict[str, Any]]) -> None:
        # On the client's event loop, where nothing may block.
        with suppress(RuntimeError):
            self._pool.submit(self._take, event[1])

    def _take(self, question: dict[str, Any]) -> None:
        try:
            self._answer(question)
        except Exception:
            logger.warning("A worker's question for task run %s was not answered", question.get("name"), exc_info=True)

    def _answer(self, question: dict[str, Any]) -> None:
        key, number, workers = question["key"], question["number"], [str(name) for name in question["workers"]]
        self._fates.record_lost_task(key, workers)
        why = self._fates.describe(workers[-1]) if workers else str(question.get("why") or "its worker")
        if workers and getattr(self._client, "lost_lately", False):
            why += " (the connection to the Dask scheduler was lost as well)"
        answer: dict[str, Any] = {"why": why}
        state = self._final_state(key)
        if state is not None:
            blob = cloudpickle.dumps(state)
            if len(blob) <= LIMIT:
                answer["state"] = blob
        self._client.set_metadata([METADATA_ROOT, self._run_key, number], answer)
        about = f"Task run {question['name']} ({question['task_run_id']})"
        if "state" in answer:
            self._log("debug", f"{about}: its result was given back to the cluster, which lost it with {why}")
        elif question["held"]:
            self._log("warning", f"{about} is computed again: its result is still needed, and was lost with {why}")
        else:
            self._log("warning", f"{about} runs again: it was lost with {why}")
