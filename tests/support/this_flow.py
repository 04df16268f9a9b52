"""What the flow that asks has: called in a flow's own function, which travels to workers and so names nothing live."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dask.base import get_annotations
from prefect.runtime import flow_run

from prefect_htcdask.runner import flow_run as sessions


def run_of_this_flow() -> sessions.FlowRunSession:
    """Its live handles, once it has submitted a task."""
    run = sessions.find(str(flow_run.id))
    assert run is not None
    return run


def client_of_this_flow() -> Any:
    """Its Dask client."""
    return run_of_this_flow().client


class Sizes(list[int]):
    """Sizes of graphs, and the annotations that each was sent with."""

    def __init__(self) -> None:
        super().__init__()
        self.annotations: list[dict[str, Any]] = []


@contextmanager
def graphs() -> Iterator[Sizes]:
    """The graphs that this flow run sends meanwhile."""
    client, sizes = client_of_this_flow(), Sizes()
    to_futures = client._graph_to_futures

    def noted(graph: Any, keys: list[Any], *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(keys))
        sizes.annotations.append(get_annotations())
        return to_futures(graph, keys, *args, **kwargs)

    client._graph_to_futures = noted
    try:
        yield sizes
    finally:
        del client._graph_to_futures
