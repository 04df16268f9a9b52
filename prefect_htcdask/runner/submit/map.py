"""What each call of a `map` gets."""

from __future__ import annotations

from typing import Any

from prefect.exceptions import MappingLengthMismatch, MappingMissingIterable
from prefect.tasks import Task
from prefect.utilities.annotations import allow_failure, opaque, quote, unmapped
from prefect.utilities.callables import (
    collapse_variadic_parameters,
    explode_variadic_parameter,
    get_parameter_defaults,
)
from prefect.utilities.collections import isiterable
from prefect.utilities.engine import resolve_inputs_sync


def expand_mapping(task: Task[Any, Any], parameters: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Split the parameters of a `map` into those of each call and those that all calls share.

    The rules are those of `prefect.task_runners.TaskRunner.map`.

    Returns:
        the parameters of each call, and the shared ones; a call's are its own followed by the shared.

    Raises:
        MappingMissingIterable: no parameter is iterable.
        MappingLengthMismatch: the iterables differ in length.
    """
    # Only the top level is resolved, so as to know what to map over; what is nested in it is resolved where it is used.
    parameters = resolve_inputs_sync(parameters, max_depth=0)
    parameters = explode_variadic_parameter(task.fn, parameters)
    iterables: dict[str, list[Any]] = {}
    static: dict[str, Any] = {}
    annotated: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, (allow_failure, opaque, quote)):
            annotated[name] = value
            value = value.unwrap()
        if isinstance(value, unmapped):
            static[name] = value.value
        elif isiterable(value):
            iterables[name] = list(value)
        else:
            static[name] = value
    if not iterables:
        raise MappingMissingIterable(
            "No iterable parameters were received. Parameters for map must include at least one iterable. "
            f"Parameters: {parameters}"
        )
    lengths = {name: len(values) for name, values in iterables.items()}
    if len(set(lengths.values())) > 1:
        raise MappingLengthMismatch(
            "Received iterable parameters with different lengths. Parameters for map must all be the same length. "
            f"Got lengths: {lengths}"
        )
    for name, value in get_parameter_defaults(task.fn).items():
        if name not in iterables:
            static.setdefault(name, value)
    for name, annotation in annotated.items():
        if name in static:
            static[name] = annotation.rewrap(static[name])
    calls = [
        {
            name: annotated[name].rewrap(values[index]) if name in annotated else values[index]
            for name, values in iterables.items()
        }
        for index in range(next(iter(lengths.values())))
    ]
    collapsed = collapse_variadic_parameters(task.fn, {**(calls[0] if calls else {}), **static})
    if set(collapsed) != {*iterables, *static}:
        # Exploded keyword arguments go back into one parameter, which then holds mapped and shared values.
        return [collapse_variadic_parameters(task.fn, {**call, **static}) for call in calls], {}
    return calls, static
