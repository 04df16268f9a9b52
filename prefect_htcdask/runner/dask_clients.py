"""Dask clients for use inside tasks and flows, as prefect_dask's `get_dask_client`.

prefect_dask's own connect to the scheduler's bare address; behind a gateway a client needs the cluster's TLS
credentials too, and in a flow the cluster may not have been provisioned yet.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from datetime import timedelta
from typing import Any

import distributed
from dask.utils import parse_timedelta
from distributed import Client, Worker
from prefect.context import FlowRunContext, TaskRunContext
from prefect_dask.task_runners import DaskTaskRunner

from prefect_htcdask.worker.dask_client import WorkerClient, client_of
from prefect_htcdask.worker.secede import seceded


def _worker() -> Worker | None:
    """The worker on which the task runs that calls; `None` in a flow, and in a task that was called, not submitted."""
    if TaskRunContext.get() is None:
        return None
    try:
        return distributed.get_worker()
    except ValueError:
        return None


def _arguments(
    worker: Worker | None, asynchronous: bool, timeout: float | str | timedelta | None, given: dict[str, Any]
) -> dict[str, Any]:
    flow_run = FlowRunContext.get()
    arguments: dict[str, Any] = {"asynchronous": asynchronous}
    if worker is not None:
        # Other tasks of the worker have its own client for their default.
        arguments.update(address=worker.scheduler.address, security=worker.security, set_as_default=False)
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
    """A Dask client of the cluster that runs the flow: in tasks, in flows, and outside of both.

    In a task it is the client that all tasks of the worker share, unless `client_kwargs` ask for one of its own; it is
    what `distributed.get_client`, ``.compute()`` and the like use within the context. The task's slot on its worker is
    free for other tasks meanwhile, as with `distributed.worker_client`: those that it waits for may need it.

    Args:
        timeout: how long connecting may take, in seconds or as "10 s".
        client_kwargs: further arguments of `distributed.Client`.
    """
    worker = _worker()
    if worker is None:
        with Client(**_arguments(None, False, timeout, client_kwargs)) as client:
            yield client
        return
    with ExitStack() as stack:
        if client_kwargs:
            client = stack.enter_context(WorkerClient(**_arguments(worker, False, timeout, client_kwargs)))
        else:
            client = client_of(worker, parse_timedelta(timeout) if timeout is not None else None)
        stack.enter_context(client.as_current())
        stack.enter_context(seceded(True))
        yield client


@asynccontextmanager
async def get_async_dask_client(
    timeout: float | str | timedelta | None = None, **client_kwargs: Any
) -> AsyncIterator[Client]:
    """As `get_dask_client`, for async tasks and flows; the client is one of the task's own event loop."""
    worker = _worker()
    async with Client(**_arguments(worker, True, timeout, client_kwargs)) as client:
        with ExitStack() as stack:
            if worker is not None:
                stack.enter_context(client.as_current())
                stack.enter_context(seceded(True))
            yield client
