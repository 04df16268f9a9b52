"""The context in which a task run runs on a worker, as fresh as `prefect.context.hydrated_context` would make it.

It is made of cheap copies of prototypes, which all task runs of a flow run have in common, and of an API client that is
kept open per thread.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import UUID

import cloudpickle

from prefect_htcdask.utils.prefect_client import send_again_where_kept
from prefect_htcdask.worker.flow_logging import FlowLogging, logging_as, take_on
from prefect_htcdask.worker.metadata_cache import MetadataKey, blobs

if TYPE_CHECKING:
    from prefect_htcdask.worker.call import Call

MAX_CLIENTS_PER_THREAD = 4
MAX_SETTINGS = 8

_thread = threading.local()
_settings: OrderedDict[str, Any] = OrderedDict()
_settings_lock = threading.Lock()


@dataclass
class Prototypes:
    """A hydrated context, of which every task run gets copies.

    Attributes:
        parameters: those of the flow run, pickled, or where they are; a task run gets a copy of its own.
        client_key: names the API, and how to come to it.
        offers: what the cluster's worker groups offer (`scaling.groups.Offers`), where the flow's process knew.
        logging: how the flow's process logs.
    """

    settings: Any | None
    flow_run: Any | None
    parent: Any | None
    parameters: bytes | MetadataKey | None
    deployment_id: UUID | None
    deployment_parameters: dict[str, Any] | None
    client_key: str
    offers: Any
    logging: FlowLogging | None = None
    _stack: ExitStack = field(default_factory=ExitStack)


def hydrate(blob: bytes) -> Prototypes:
    """Build the prototypes of `prefect.context.hydrated_context`, without entering any of them."""
    from prefect.context import FlowRunContext, TaskRunContext
    from prefect.flows import Flow
    from prefect.logging.configuration import ensure_logging_setup
    from prefect.tasks import Task

    from prefect_htcdask.compat.prefect import ResultRecordMetadata

    content: dict[str, Any] = cloudpickle.loads(blob)
    context = content["context"]
    types = {"Flow": Flow, "Task": Task, "ResultRecordMetadata": ResultRecordMetadata}
    FlowRunContext.model_rebuild(_types_namespace=types)
    TaskRunContext.model_rebuild(_types_namespace=types)
    ensure_logging_setup()

    deployment_id = context.get("deployment_id")
    made = Prototypes(
        settings=_settings_context(content["settings"]),
        flow_run=None,
        parent=None,
        parameters=content["parameters"],
        deployment_id=UUID(deployment_id) if deployment_id else None,
        deployment_parameters=context.get("deployment_parameters"),
        client_key=content["client_key"],
        offers=content["offers"],
    )
    with _copy_of(made.settings), _open_client(made.client_key) as client:
        made.logging = take_on(content["logging"])
        if flow_run := context.get("flow_run_context"):
            runner = made._stack.enter_context(flow_run["flow"].task_runner.duplicate())
            made.flow_run = FlowRunContext(**flow_run, client=client, task_runner=runner, detached=True)
        if parent := context.get("task_run_context"):
            made.parent = TaskRunContext(**parent, client=client)
    return made


def _settings_context(blob: bytes | None) -> Any | None:
    """The prototype of the settings; the flow runs of one user mostly have the same ones, which take long to make."""
    from prefect.context import SettingsContext

    if blob is None:
        return None
    digest = hashlib.sha256(blob).hexdigest()
    with _settings_lock:
        if digest in _settings:
            _settings.move_to_end(digest)
            return _settings[digest]
    made = SettingsContext(**cloudpickle.loads(blob))
    with _settings_lock:
        _settings[digest] = made
        while len(_settings) > MAX_SETTINGS:
            _settings.popitem(last=False)
    return made


@contextmanager
def task_context(prototypes: Prototypes, call: Call) -> Iterator[None]:
    """The context of `prefect.context.hydrated_context`, from prototypes.

    Whatever a task run may change is new for each: the links from results to states, which Prefect keys by `id`, must
    not outlive the task run, or a later object at the same address would inherit them.
    """
    from prefect.context import AssetContext, tags
    from prefect.results import default_cache

    from prefect_htcdask.compat.prefect import deployment, no_suspension

    with ExitStack() as stack:
        stack.enter_context(_copy_of(prototypes.settings))
        stack.enter_context(logging_as(prototypes.logging))
        client = stack.enter_context(_open_client(prototypes.client_key))
        if prototypes.flow_run is not None:
            store = prototypes.flow_run.result_store.model_copy(update={"cache": default_cache()})
            stack.enter_context(
                _copy_of(
                    prototypes.flow_run,
                    client=client,
                    parameters=_loaded(prototypes.parameters),
                    result_store=store,
                    run_results={},
                    task_run_assets={},
                    task_run_dynamic_keys={},
                    observed_flow_pauses={},
                    flow_run_suspension_request=no_suspension(),
                )
            )
        if prototypes.parent is not None:
            store = prototypes.parent.result_store.model_copy(update={"cache": default_cache()})
            stack.enter_context(_copy_of(prototypes.parent, client=client, result_store=store))
        if call.tags:
            stack.enter_context(tags(*call.tags))
        if call.asset_context:
            stack.enter_context(AssetContext(**call.asset_context))
        stack.enter_context(deployment(prototypes.deployment_id, prototypes.deployment_parameters))
        yield


def _loaded(parameters: bytes | MetadataKey | None) -> Any:
    if parameters is None:
        return None
    return cloudpickle.loads(parameters if isinstance(parameters, bytes) else blobs.get(tuple(parameters)))


@contextmanager
def _copy_of(context: Any | None, **update: Any) -> Iterator[Any | None]:
    """Enter a copy of a context model, since one object cannot be entered by two threads."""
    if context is None:
        yield None
    else:
        with context.model_copy(update=update) as entered:
            yield entered


@contextmanager
def _open_client(key: str) -> Iterator[Any]:
    """Put this thread's open client of an API into the context; the settings in it say which that is."""
    from prefect.context import SettingsContext, SyncClientContext

    from prefect_htcdask.compat.prefect import with_client

    clients: OrderedDict[str, Any] = _thread.__dict__.setdefault("clients", OrderedDict())
    context = clients.get(key)
    if context is None:
        context = SyncClientContext()
        context.client.__enter__()
        # The engine's requests are as far apart as a worker's tasks.
        send_again_where_kept(context.client)
        settings = SettingsContext.get()
        if settings is None or settings.settings.client.server_version_check_enabled:
            context.client.raise_for_api_version_mismatch_once()
        clients[key] = context
        while len(clients) > MAX_CLIENTS_PER_THREAD:
            _, oldest = clients.popitem(last=False)
            with suppress(Exception):
                oldest.client.__exit__(None, None, None)
    clients.move_to_end(key)
    with with_client(context):
        yield context.client
