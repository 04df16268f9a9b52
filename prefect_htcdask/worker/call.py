"""A task run as it is sent to a worker, and what belongs to it while it runs there."""

from __future__ import annotations

import contextvars
from dataclasses import dataclass
from typing import Any
from uuid import UUID


@dataclass(frozen=True)
class Upstream:
    """Stands for the state of an upstream task run in parameters; Dask brings the state itself."""

    index: int


@dataclass
class Call:
    """One task run, as it is sent: everything that differs from call to call.

    `shared` names the parameters whose values come in the batch's shared blob; `order` is the order in which the
    task run sees its parameters.
    """

    task_run_id: UUID
    parameters: dict[str, Any]
    order: tuple[str, ...]
    wait_for: Any
    dependencies: dict[str, set[Any]]
    tags: tuple[str, ...]
    asset_context: dict[str, Any]
    upstreams: int


@dataclass
class CallScope:
    """What belongs to one call while it runs: where its envelope is, and what it submits itself (`live.NestedRun`).

    `offers` is what the cluster's worker groups offer (`scaling.groups.Offers`), where the flow's process knew.
    """

    envelope_key: tuple[str, ...]
    offers: Any | None = None
    nested: Any | None = None


current_call: contextvars.ContextVar[CallScope] = contextvars.ContextVar("prefect_htcdask_call")
