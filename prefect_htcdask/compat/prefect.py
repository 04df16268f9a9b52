"""Prefect's private names. Each function says what it stands in for; checked with prefect 3.8.

Whatever else this package uses of Prefect is public. `docs/upstream.md` says what would let each of these go.
"""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect._internal.result_records import ResultRecord as ResultRecord
from prefect._internal.result_records import ResultRecordMetadata as ResultRecordMetadata
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task
from prefect.utilities.annotations import allow_failure, opaque, quote, unmapped

if TYPE_CHECKING:
    import httpx
    from prefect.context import SyncClientContext


def new_task_run_id() -> UUID:
    """An id for a task run, in the order of time.

    Stands in for: `prefect.task_runners`, ``task_run_id = uuid7()``.
    """
    from prefect._internal.uuid7 import uuid7

    return uuid7()


def stop_if_suspended() -> None:
    """Leave the flow or task here if its flow run is to be suspended.

    Stands in for: `prefect.task_engine.run_task_sync`, ``raise_if_flow_run_suspension_requested()``.

    Raises:
        prefect.exceptions.Pause: it is.
    """
    from prefect._flow_run_suspension import raise_if_flow_run_suspension_requested

    raise_if_flow_run_suspension_requested()


def no_suspension() -> Any:
    """What a context of a flow run holds as long as nobody has asked for its suspension.

    Stands in for: `prefect.context.FlowRunContext`, the default of ``flow_run_suspension_request``.
    """
    from prefect._flow_run_suspension import FlowRunSuspensionRequest

    return FlowRunSuspensionRequest()


def crashed_state(exc: BaseException) -> State[Any]:
    """The state of a task run that crashed with an exception.

    Stands in for: `prefect.states.exception_to_crashed_state`, which is a coroutine.
    """
    from prefect._internal.states import exception_to_crashed_state_sync

    return exception_to_crashed_state_sync(exc)


def describe_task_run(task: Task[Any, Any], arguments: Mapping[str, Any]) -> TaskRun:
    """A task run as its worker first tells the API of it.

    Stands in for: `prefect.task_engine.SyncTaskRunEngine.initialize_run`, ``_create_task_run_locally(...)``.

    Args:
        task: the task.
        arguments: `task_run_id`, `parameters`, `wait_for` and `dependencies`, as the engine takes them.
    """
    from prefect.task_engine import _create_task_run_locally

    return _create_task_run_locally(
        task=task,
        id=arguments["task_run_id"],
        parameters=arguments["parameters"],
        wait_for=arguments["wait_for"],
        extra_task_inputs=arguments["dependencies"],
    )


def read_result(metadata: ResultRecordMetadata) -> ResultRecord[Any]:
    """A result that was persisted.

    Stands in for: `prefect.states.get_state_result`, ``ResultStore._from_metadata(metadata)``.

    Raises:
        Exception: it cannot be read from here.
    """
    from prefect.results import ResultStore
    from prefect.utilities.asyncutils import run_coro_as_sync

    record: ResultRecord[Any] = run_coro_as_sync(ResultStore._from_metadata(metadata))
    return record


@contextmanager
def deployment(deployment_id: UUID | None, parameters: dict[str, Any] | None) -> Iterator[None]:
    """While it lasts, the run is of a deployment.

    Stands in for: `prefect.context.hydrated_context`, which sets ``_deployment_id`` and ``_deployment_parameters``.
    """
    from prefect.context import _deployment_id, _deployment_parameters

    tokens: list[tuple[Any, Any]] = []
    if deployment_id is not None:
        tokens.append((_deployment_id, _deployment_id.set(deployment_id)))
    if parameters:
        tokens.append((_deployment_parameters, _deployment_parameters.set(copy.deepcopy(parameters))))
    try:
        yield
    finally:
        for variable, token in reversed(tokens):
            variable.reset(token)


@contextmanager
def with_client(context: SyncClientContext) -> Iterator[None]:
    """While it lasts, the engine uses a client that is open already, and leaves it open.

    Stands in for: `prefect.context.SyncClientContext.get_or_create`, which opens one for each outermost use.
    """
    token = type(context).__var__.set(context)
    try:
        yield
    finally:
        type(context).__var__.reset(token)


def http_client(client: Any) -> httpx.Client:
    """The HTTP client in a client of the Prefect API, to set what its settings cannot.

    Stands in for: an argument of `prefect.client.orchestration.get_client` for the transport.
    """
    inside: httpx.Client = client._client
    return inside


def data_of(state: State[Any]) -> Any:
    """The user's data in a state: the result, where it came in a record, else whatever the state's own data is."""
    return state.data.result if isinstance(state.data, ResultRecord) else state.data


def put_data(state: State[Any], data: Any) -> None:
    """Put the user's data into a state, as it is: no validation, and no note that the field was set.

    Stands in for: `pydantic.BaseModel.model_copy`, which resets the timestamp of Prefect's states.
    """
    if isinstance(state.data, ResultRecord):
        record = copy.copy(state.data)
        record.__dict__["result"] = data
        state.__dict__["data"] = record
    else:
        state.__dict__["data"] = data


def become(state: State[Any], cls: type[State[Any]], private: dict[str, Any] | None) -> None:
    """Make a state one of another class, the same object: its engine, and whoever waits for it, hold it already.

    Stands in for: a hook of `prefect.client.schemas.objects.State` for how its data is pickled.
    """
    object.__setattr__(state, "__class__", cls)
    object.__setattr__(state, "__pydantic_private__", private)


def _reduce_annotation(annotation: Any) -> tuple[type[Any], tuple[Any]]:
    return type(annotation), (annotation.unwrap(),)


def make_annotations_picklable() -> None:
    """Have pickle take Prefect's annotations, in this process.

    Stands in for: ``BaseAnnotation.__reduce__``. They are tuples whose constructor takes the one value in them, which
    pickle does not know: it would hand them their own tuple, and a task would get a tuple round its argument.
    """
    for annotation in (allow_failure, opaque, quote, unmapped):
        copyreg.pickle(annotation, _reduce_annotation)
