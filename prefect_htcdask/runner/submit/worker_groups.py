"""Which worker group a Prefect task goes to, as its flow says it: from that to the resources that it asks Dask for.

A flow names a group in three ways: the context manager `worker_group`, the task tag ``worker-group:NAME`` (on the task,
or from Prefect's `tags`), and Dask's own ``dask.annotate(resources={"GPU": 1})``. What the groups offer to it is known
from the settings, the cluster or the scheduler.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Real
from typing import Any

import dask.base

from prefect_htcdask.errors import UnknownWorkerGroupError, WorkerGroupError
from prefect_htcdask.scheduler.worker_groups import GROUP_RESOURCE, Offers, group_for, group_resource

TAG_PREFIX = "worker-group:"
"""A task tag with this prefix names the worker group in the rest of it."""

_current: ContextVar[str | None] = ContextVar("prefect_htcdask_worker_group", default=None)


@contextmanager
def worker_group(name: str) -> Iterator[None]:
    """Send the tasks that are submitted within to the workers of one group.

    It counts more than a tag of the task; of nested ones the innermost counts. It holds for what this thread or
    coroutine submits, in subflows too, and not for what the tasks themselves submit on their workers.

    Args:
        name: a group of the runner's `workers`.

    Raises:
        TypeError: `name` is no string.

    Examples:
        ```python
        @flow(task_runner=HTCDaskTaskRunner(workers={"cpu": {}, "gpu": {"gpus": 1}}))
        def analysis() -> None:
            events = load.map(FILES)
            with worker_group("gpu"):
                train.submit(events)
        ```
    """
    if not isinstance(name, str):
        raise TypeError(f"worker_group({name!r}): the name of a worker group is a string")
    token = _current.set(name)
    try:
        yield
    finally:
        _current.reset(token)


def resources_of(task: str, tags: Iterable[str], offers: Offers | None) -> dict[str, float] | None:
    """The Dask resources that a task asks for that is submitted just here: see `resolve`."""
    return resolve(
        task,
        group=_current.get(),
        tags=tags,
        annotated=dask.base.get_annotations().get("resources"),
        offers=offers,
    )


def resolve(
    task: str, *, group: str | None, tags: Iterable[str], annotated: Any, offers: Offers | None
) -> dict[str, float] | None:
    """Find the Dask resources that a task asks for. Pure.

    Args:
        task: name of the task, for messages.
        group: the worker group of the innermost `worker_group`.
        tags: the task's tags.
        annotated: the resources of `dask.annotate`: a mapping, or a function that Dask calls for each task.
        offers: what the worker groups offer; `None` where nobody knows, and nothing can be checked.

    Returns:
        amounts by the resources' names; `None` where there is nothing to add to what Dask knows already.

    Raises:
        UnknownWorkerGroupError: no worker group has the name, or offers the resources.
        WorkerGroupError: two tags name different groups, or the resources are none.
    """
    named = group if group is not None else _group_of_tags(task, tags)
    if callable(annotated):
        if named is not None:
            raise WorkerGroupError(
                f"task {task!r} is to run in the worker group {named!r}, and dask.annotate gives its resources by a "
                "function; give them as a mapping, or leave one of the two out"
            )
        return None
    asked = _checked(task, annotated)
    if not offers:
        if named is not None:
            asked.setdefault(group_resource(named), 1)
        return asked or None
    if named is None:
        if asked:
            if group_for(asked, offers) is None:
                raise UnknownWorkerGroupError(
                    f"task {task!r} asks for {_amounts(asked)}, which no worker group offers: {_listed(offers)}; ask "
                    "for less, or give the resources to a group (gpus, resources)"
                )
            return asked
        # The default group's workers alone: a task that asks for nothing shall not sit on the workers of others.
        named = next(iter(offers))
    elif named not in offers:
        raise UnknownWorkerGroupError(
            f"task {task!r} is to run in the worker group {named!r}, which there is not; there "
            f"{'is' if len(offers) == 1 else 'are'} {', '.join(offers)}. Name one of them, or add the group to "
            "workers={...} of HTCDaskTaskRunner"
        )
    elif group_for(asked, {named: offers[named]}) is None:
        raise UnknownWorkerGroupError(
            f"task {task!r} is to run in the worker group {named!r} and asks for {_amounts(asked)}, which that does "
            f"not offer: {_listed(offers)}; ask for less, or give the resources to the group (gpus, resources)"
        )
    # Where there is but one group any worker will do, and Dask queues only tasks that ask for no resources.
    if len(offers) > 1 and group_resource(named) in offers[named]:
        asked.setdefault(group_resource(named), 1)
    return asked or None


def _group_of_tags(task: str, tags: Iterable[str]) -> str | None:
    named = sorted({tag.removeprefix(TAG_PREFIX) for tag in tags if tag.startswith(TAG_PREFIX)})
    if len(named) > 1:
        raise WorkerGroupError(
            f"task {task!r} has tags of several worker groups ({', '.join(named)}), and runs in one of them only; "
            "leave one tag, or say which with worker_group(...)"
        )
    return named[0] if named else None


def _checked(task: str, annotated: Any) -> dict[str, float]:
    """The annotated resources; the scheduler would only fail at others, without a word to the flow."""
    if annotated is None:
        return {}
    if not isinstance(annotated, Mapping):
        raise WorkerGroupError(
            f"task {task!r}: dask.annotate(resources={annotated!r}) is no mapping; write one such as {{'GPU': 1}}"
        )
    for name, amount in annotated.items():
        if not isinstance(name, str) or not _is_amount(amount):
            raise WorkerGroupError(
                f"task {task!r}: dask.annotate(resources={dict(annotated)!r}) has no amount of a resource in "
                f"{name!r}: {amount!r}; write a number from 0 by the resource's name, such as {{'GPU': 1}}"
            )
    return dict(annotated)


def _is_amount(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) < math.inf


def _listed(offers: Offers) -> str:
    """The groups and what they offer, without the resources that stand for the groups themselves."""
    groups = {
        name: {resource: amount for resource, amount in offer.items() if not resource.startswith(GROUP_RESOURCE)}
        for name, offer in offers.items()
    }
    return ", ".join(f"{name} has {_amounts(offer) if offer else 'none'}" for name, offer in groups.items())


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={amount:g}" for name, amount in resources.items())
