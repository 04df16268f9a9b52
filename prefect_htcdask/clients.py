"""Dask clients for use inside tasks and flows, as prefect_dask's `get_dask_client`.

prefect_dask's own connect to the scheduler's bare address; behind a gateway a client needs the cluster's TLS
credentials too, and in a flow the cluster may not have been provisioned yet.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from typing import Any

import distributed
from distributed import Client
from prefect.context import FlowRunContext, TaskRunContext
from prefect_dask.task_runners import DaskTaskRunner


def _arguments(asynchronous: bool, timeout: float | str | timedelta | None, given: dict[str, Any]) -> dict[str, Any]:
    flow_run, task_run = FlowRunContext.get(), TaskRunContext.get()
    arguments: dict[str, Any] = {"asynchronous": asynchronous}
    source: Any = None
    if task_run is not None:
        try:
            source = distributed.get_worker()
        except ValueError:
            # A task that was called, not submitted, runs in the flow's process.
            source = None
    if source is not None:
        arguments.update(address=source.scheduler.address, security=source.security)
    elif flow_run is not None and isinstance(flow_run.task_runner, DaskTaskRunner):
        client: Any = flow_run.task_runner.client
        arguments.update(flow_run.task_runner.client_kwargs)
        arguments.update(address=client.scheduler.address, security=client.security)
    if timeout is not None:
        arguments["timeout"] = timeout
    arguments.update(given)
    return arguments


@contextmanager
def get_dask_client(timeout: float | str | timedelta | None = None, **client_kwargs: Any) -> Iterator[Client]:
    """A temporary Dask client of the cluster that runs the flow: in tasks, in flows, and outside of both.

    Args:
        timeout: how long connecting may take, in seconds or as "10 s".
        client_kwargs: further arguments of `distributed.Client`.
    """
    with Client(**_arguments(False, timeout, client_kwargs)) as client:
        yield client


@asynccontextmanager
async def get_async_dask_client(
    timeout: float | str | timedelta | None = None, **client_kwargs: Any
) -> AsyncIterator[Client]:
    """As `get_dask_client`, for async tasks and flows."""
    async with Client(**_arguments(True, timeout, client_kwargs)) as client:
        yield client
