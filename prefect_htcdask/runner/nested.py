"""Submission from inside a task."""

from __future__ import annotations

from typing import Any, cast

import distributed
from distributed import Client

from prefect_htcdask.runner.client.connection import Connection
from prefect_htcdask.runner.futures.gatherer import gatherer_of
from prefect_htcdask.runner.futures.pending_result import PendingResult
from prefect_htcdask.runner.submit.submitter import Submitter
from prefect_htcdask.scheduler.worker_groups import Offers
from prefect_htcdask.worker.call import current_call
from prefect_htcdask.worker.metadata_cache import METADATA_ROOT


class NestedRun:
    """Submission from inside a task, through its worker's own client. Nothing is provisioned or closed."""

    def __init__(self, client: Client, run_id: str, offers: Offers | None = None) -> None:
        self.client = client
        self.submitter = Submitter(Connection(client), run_id, None, offers)
        self.gatherer = gatherer_of(client)

    @property
    def offers(self) -> Offers | None:
        """What the worker groups of the cluster offer, as far as the flow's process knew."""
        return self.submitter.offers

    def track(self, results: list[PendingResult]) -> None:
        """Hold nothing: a future that its task drops is given up with it, as prefect-dask does."""
        for result in results:
            result.upstreams = ()

    def check(self) -> None:
        """Nothing can be wrong yet."""

    def close(self) -> None:
        """The task has ended: take its envelopes back from the scheduler, without waiting for it."""
        client = cast(Any, self.client)
        for key in self.submitter.metadata_keys():
            client.loop.add_callback(client.scheduler.set_metadata, keys=[METADATA_ROOT, *key], value=None)


def nested_run() -> NestedRun:
    """How the task that runs here, on a Dask worker, submits further tasks."""
    client = distributed.get_client()
    scope = current_call.get(None)
    if scope is None:
        return NestedRun(client, client.id)
    if scope.nested is None:
        scope.nested = NestedRun(client, scope.envelope_key[0], scope.offers)
    run: NestedRun = scope.nested
    return run
