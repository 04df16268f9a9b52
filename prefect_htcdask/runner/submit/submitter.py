"""The flow's side of `run_task`: a Prefect task becomes a Dask task.

What many calls have in common travels once: the context of the flow run and the task (`serialized_context`) and, in a
`map`, the parameters that every call shares. They are left in the scheduler's task metadata, from where each worker
process fetches what it has not seen (`metadata_cache`). A call itself is a few hundred bytes.

The Dask tasks name nothing but functions of Dask itself, since a gateway's scheduler unpickles the graph and has
neither Prefect nor this package nor the user's modules.
"""

from __future__ import annotations

import functools
import re
import uuid
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple
from uuid import UUID

from dask.base import get_annotations
from dask.utils import key_split
from distributed import Future
from distributed.protocol.pickle import dumps
from prefect.client.schemas.objects import State
from prefect.context import (
    AssetContext,
    FlowRunContext,
    TagsContext,
)
from prefect.tasks import MaterializingTask, Task
from prefect.utilities.annotations import BaseAnnotation
from prefect.utilities.engine import collect_task_run_inputs_sync

from prefect_htcdask.compat.dask import DataNode
from prefect_htcdask.compat.prefect import make_annotations_picklable, new_task_run_id
from prefect_htcdask.runner.client.connection import Connection
from prefect_htcdask.runner.client.task_spec import NO_OPTIONS, SendOptions, SharedData, TaskSpec
from prefect_htcdask.runner.submit.large_states import LargeStates
from prefect_htcdask.runner.submit.serialized_context import ContextPublisher
from prefect_htcdask.runner.submit.upstream_futures import UpstreamFutures
from prefect_htcdask.scheduler.worker_groups import Offers
from prefect_htcdask.worker.call import Call
from prefect_htcdask.worker.metadata_cache import MetadataKey

MAP_BATCH = 2000
"""Task runs of a `map` that go to the scheduler in one graph; more would hold back the first of them."""

MAP_BYTES = 16 * 1024**2
"""Bytes of parameters in one graph of a `map`, about: client and scheduler hold a graph as a whole."""

METADATA_LIMIT = 8 * 1024**2
"""Shared parameters up to this size, in bytes, wait at the scheduler; larger ones are Dask data, copied from worker to
worker."""

METADATA_TOTAL = 64 * 1024**2
"""Bytes that wait at the scheduler in all, about: they stay there until the run ends, and Dask data does not."""

_UNSAFE = re.compile(r"[^0-9A-Za-z]+")


@functools.lru_cache(maxsize=1024)
def key_prefix(name: str) -> str:
    """The start of a Dask key from which Dask reads the task's name again.

    Dask learns durations per name, as `dask.utils.key_split` finds it in the key. A name that it would cut short
    (``load-2``) is written with underscores.
    """
    example = "01890000-0000-7000-8000-000000000000"
    if name and key_split(f"{name}-{example}") == name:
        return name
    safe = _UNSAFE.sub("_", name).strip("_")
    return safe if safe and key_split(f"{safe}-{example}") == safe else f"task_{safe}".rstrip("_")


make_annotations_picklable()


class Submitted(NamedTuple):
    """A task run that was submitted.

    Attributes:
        task_run_id: its id.
        future: Dask's future of its final state.
        upstreams: the futures that it needs, and Dask's futures of states that were brought back for it.
        spec: what it takes to submit it again, where its client may have to.
    """

    task_run_id: UUID
    future: Future[Any]
    upstreams: list[Any]
    spec: TaskSpec | None


class Submitter:
    """Turns Prefect tasks into Dask tasks on one client, for one live run.

    Args:
        connection: to the scheduler; that of its worker's own client on a worker.
        run_id: names this run's part of the scheduler's metadata.
        api_url: the Prefect API as workers reach it; put into their settings where the flow has none (an ephemeral
            server).
        offers: what the cluster's worker groups offer, for tasks that submit further ones; `None` where unknown.
    """

    def __init__(self, connection: Connection, run_id: str, api_url: str | None, offers: Offers | None = None) -> None:
        self._connection = connection
        self.offers = offers
        self._publisher = ContextPublisher(connection.client, run_id, api_url)
        self._large_states = LargeStates(connection)
        self._options = NO_OPTIONS

    def submit(
        self,
        task: Task[Any, Any],
        parameters: dict[str, Any],
        wait_for: Any,
        dependencies: Mapping[str, set[Any]] | None,
        resources: Mapping[str, float] | None = None,
    ) -> Submitted:
        """Submit one task run that asks Dask for `resources`."""
        envelope = self._publisher.envelope(task, self.offers)
        upload = partial(self._large_states.upload, resources=resources)
        needed = UpstreamFutures(self._connection.client, upload=upload)
        task_run_id, spec = self._describe_call(task, envelope, parameters, wait_for, dependencies or {}, needed)
        spec.options = self._send_options(resources)
        future = self._connection.submit(spec, needed)
        return Submitted(task_run_id, future, _needs(needed), self._connection.resubmitted(spec))

    def submit_many(
        self,
        task: Task[Any, Any],
        calls: list[dict[str, Any]],
        shared: dict[str, Any],
        wait_for: Any,
        dependencies: Mapping[str, set[Any]],
        resources: Mapping[str, float] | None = None,
    ) -> list[Submitted]:
        """Submit one task run for each of `calls`, all with the parameters in `shared` besides their own.

        Each asks Dask for `resources`; `None` leaves them to `dask.annotate`.

        Returns:
            what was submitted, in the order of `calls`.
        """
        envelope = self._publisher.envelope(task, self.offers)
        wait_for = as_list(wait_for)  # once, should it be an iterator
        shared_inputs = {name: collect_task_run_inputs_sync(value) for name, value in shared.items()}
        upload = partial(self._large_states.upload, resources=resources)
        holder = UpstreamFutures(self._connection.client, upload=upload)
        shared = {name: holder.replace(value) for name, value in shared.items()}
        # Values with upstream states in them differ from plain ones in nothing but that Dask has to fill them.
        reference: Any = None
        extra: dict[str, Any] = {}
        anchor: Future[Any] | None = None
        if shared and not holder.results:
            reference, extra, anchor = self._share(shared)
            own: dict[str, Any] = {}
        else:
            own = shared
        submitted: list[Submitted] = []
        specs: list[TaskSpec] = []
        needed: list[tuple[UUID, UpstreamFutures]] = []
        waiting = 0
        for number, parameters in enumerate(calls, 1):
            upstreams = UpstreamFutures(self._connection.client, holder, upload)
            task_run_id, spec = self._describe_call(
                task,
                envelope,
                parameters,
                wait_for,
                dependencies,
                upstreams,
                shared_names=tuple(shared),
                shared_reference=reference,
                shared_inputs=shared_inputs,
                replaced=own,
            )
            specs.append(spec)
            needed.append((task_run_id, upstreams))
            waiting += len(spec.payload)
            if number < len(calls) and len(specs) < MAP_BATCH and waiting < MAP_BYTES:
                continue
            # The key of the shared data comes last; later graphs depend on what the first brought.
            options = self._send_options(resources)
            for one in specs:
                one.options = options
            futures_ = self._connection.send(specs, extra)
            if extra:
                anchor, extra = futures_.pop(), {}
            submitted += [
                Submitted(task_run_id, future, _needs(upstreams), self._connection.resubmitted(spec))
                for (task_run_id, upstreams), future, spec in zip(needed, futures_, specs, strict=True)
            ]
            specs, needed, waiting = [], [], 0
        del anchor
        return submitted

    def metadata_keys(self) -> list[MetadataKey]:
        """Where the scheduler holds what this object left there."""
        return self._publisher.metadata_keys()

    def close(self, forget: bool) -> None:
        """Keep nothing on the cluster any more.

        Args:
            forget: remove this run's envelopes and shared parameters from a scheduler that lives on.
        """
        self._large_states.close()
        if forget:
            self._publisher.clear()

    def _describe_call(
        self,
        task: Task[Any, Any],
        envelope: MetadataKey,
        parameters: dict[str, Any],
        wait_for: Any,
        dependencies: Mapping[str, set[Any]],
        needed: UpstreamFutures,
        *,
        shared_names: tuple[str, ...] = (),
        shared_reference: Any = None,
        shared_inputs: Mapping[str, set[Any]] | None = None,
        replaced: Mapping[str, Any] | None = None,
    ) -> tuple[UUID, TaskSpec]:
        """One task run as a Dask task; `needed`, which takes what it needs, is to be held until it is sent."""
        task_run_id = new_task_run_id()
        inputs = {name: collect_task_run_inputs_sync(value) for name, value in parameters.items()}
        inputs.update(shared_inputs or {})
        for name, more in dependencies.items():
            if more and name in inputs:
                inputs[name] = inputs[name] | more

        sent = {name: needed.replace(value) for name, value in parameters.items()}
        sent.update(replaced or {})
        awaited = as_list(wait_for)
        waited = needed.replace_awaited(awaited) if awaited else None
        call = Call(
            task_run_id=task_run_id,
            parameters=sent,
            order=(*parameters, *shared_names),
            wait_for=waited,
            dependencies=inputs,
            tags=current_tags(),
            asset_context=_asset_context(task, task_run_id, inputs),
            upstreams=len(needed.results),
        )
        spec = TaskSpec(
            f"{key_prefix(task.name)}-{task_run_id}",
            envelope,
            dumps(call),
            shared_reference,
            tuple(needed.sources),
        )
        return task_run_id, spec

    def _share(self, shared: dict[str, Any]) -> tuple[Any, dict[str, Any], Future[Any] | None]:
        """Bring shared parameters where workers find them: inline, at the scheduler, or as Dask data."""
        blob = dumps(shared)
        reference = self._publisher.put_within(blob, METADATA_LIMIT, METADATA_TOTAL)
        if reference is not None:
            return reference, {}, None
        key = f"shared_parameters-{uuid.uuid4()}"
        return SharedData(key, blob), {key: DataNode(key, blob)}, None

    def _send_options(self, resources: Mapping[str, float] | None) -> SendOptions:
        """How tasks are sent now; the same object for as long as that does not change."""
        options = SendOptions(get_annotations(), resources)
        if options != self._options:
            self._options = options
        return self._options


def as_list(wait_for: Any) -> list[Any]:
    """What a task waits for, as Prefect takes it: one future, state or value, or many of them, also nested."""
    if wait_for is None:
        return []
    if isinstance(wait_for, (str, bytes, Mapping, State, BaseAnnotation)) or not isinstance(wait_for, Iterable):
        return [wait_for]
    return list(wait_for)


def _needs(upstreams: UpstreamFutures) -> list[Any]:
    return [*upstreams.results, *upstreams.brought_back]


def current_tags() -> tuple[str, ...]:
    """The tags of Prefect's `tags` context."""
    context = TagsContext.get()
    return tuple(context.current_tags) if context else ()


def _asset_context(task: Task[Any, Any], task_run_id: UUID, inputs: dict[str, set[Any]]) -> dict[str, Any]:
    """The call's asset context; empty where there are no assets at all, and the worker's own comes out the same."""
    flow_run = FlowRunContext.get()
    tracked = flow_run.task_run_assets if flow_run else {}
    if not task.asset_deps and not isinstance(task, MaterializingTask) and not tracked:
        return {}
    return AssetContext.from_task_and_inputs(
        task=task, task_run_id=task_run_id, task_inputs=inputs, copy_to_child_ctx=True
    ).serialize()
