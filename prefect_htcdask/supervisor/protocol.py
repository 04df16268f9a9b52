"""What the flow's process and its supervisor say to each other, over the supervisor's stdin and stdout.

First line in: the hand-off, pickled and base64-coded, since it holds a dask_gateway authentication object. All later
lines both ways are JSON objects. Secrets travel here and nowhere else: not in arguments, not in the environment.
"""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from prefect_htcdask.condor.address import ScheddAddress
from prefect_htcdask.condor.submit_description import FlowRunTag, WorkerSpec
from prefect_htcdask.supervisor.policy import Target

# Bounds that depend on no site: how long closing may take at most, in seconds.
CLOSE_TIMEOUT = 20.0

GATEWAY_TIMEOUT = 5.0
"""Seconds that the flow's process waits at its end for a gateway to take a request, where no supervisor asks it."""


@dataclass(frozen=True)
class Preflight:
    """What can be checked before there is a gateway cluster."""

    schedd: ScheddAddress
    groups: Mapping[str, WorkerSpec]


@dataclass(frozen=True)
class GatewayAccess:
    """How to reach the gateway and the cluster's scheduler."""

    address: str
    proxy_address: str
    public_address: str
    auth: Any
    cluster_name: str
    scheduler_address: str
    tls_cert: str = field(repr=False)
    tls_key: str = field(repr=False)


@dataclass(frozen=True)
class GroupPlan:
    """One worker group.

    Attributes:
        spec: what one worker is.
        start_timeout: seconds that its first worker may take to start.
        target: how many workers are wanted.
    """

    spec: WorkerSpec
    start_timeout: float
    target: Target


@dataclass(frozen=True)
class ReportPlan:
    """What is told of a flow run's workers.

    Attributes:
        interval: seconds between two messages about the progress at least.
        rows: HTCondor jobs that one tells of at most.
        picture: whether a picture is drawn at the end.
    """

    interval: float
    rows: int
    picture: bool


@dataclass(frozen=True)
class SupervisorConfig:
    """All that a supervisor needs. Times in seconds.

    Attributes:
        groups: the worker groups by their names, the default group first.
        lease: for how long a renewal keeps the jobs.
        scheduler_lease: for how long it keeps the gateway cluster.
        request_seen: number of the last wish of another process (`DemandPlugin.scale`) that the target includes.
        report: what is told of the workers, `None` where nobody wants it.
    """

    owner: str
    parent_pid: int
    access: GatewayAccess
    schedd: ScheddAddress
    groups: Mapping[str, GroupPlan]
    worker_config: Mapping[str, Any]
    worker_secrets: Mapping[str, str] = field(repr=False)
    flow_run: FlowRunTag | None
    run_directory: str
    lease: float
    scheduler_lease: float
    lost_schedd: float
    interval: float
    residence: float
    max_idle_jobs: int
    max_failures: int
    detached: bool = False
    request_seen: int = 0
    report: ReportPlan | None = None

    def config_of(self, group: str) -> dict[str, Any]:
        """What a worker of a group reads at its start; no secret is in it."""
        spec = self.groups[group].spec
        return {
            **self.worker_config,
            "group": group,
            "flow_run_id": self.flow_run.id if self.flow_run is not None else None,
            "nthreads": spec.threads,
            "memory_limit": spec.memory,
            "resources": dict(spec.resources),
            "lifetime": spec.lifetime,
            "lifetime_stagger": spec.lifetime_stagger,
            "vacate_time": spec.vacate_time,
        }

    def with_target(self, group: str, target: Target) -> SupervisorConfig:
        """The same with another number of workers wanted in a group."""
        return replace(self, groups={**self.groups, group: replace(self.groups[group], target=target)})


def group_of(request: Mapping[str, Any], groups: Mapping[str, Any]) -> str:
    """The worker group that a wish is for: the first one by default.

    Raises:
        ValueError: there is no such group; the message names those there are.
    """
    group = request.get("group")
    if group is None:
        return next(iter(groups))
    if group not in groups:
        raise ValueError(f"group={group!r} is no worker group of this cluster; it has {', '.join(groups)}")
    return str(group)


def target_of(request: Mapping[str, Any]) -> Target:
    """The target that a wish to scale or adapt asks for.

    Raises:
        ValueError: the numbers make no sense.
    """
    if request["op"] == "scale":
        return Target(fixed=int(request["n"]))
    return Target(minimum=int(request["minimum"]), maximum=int(request["maximum"]))


def encode(message: Any) -> bytes:
    """One line that carries a hand-off."""
    return base64.b64encode(pickle.dumps(message)) + b"\n"


def decode(line: bytes) -> Any:
    """The hand-off in a line. The pipe comes from our own parent, so its pickle is trusted."""
    return pickle.loads(base64.b64decode(line))


def to_line(message: Mapping[str, Any]) -> bytes:
    """One JSON message as a line."""
    return json.dumps(dict(message), default=str).encode() + b"\n"


def from_line(line: bytes) -> dict[str, Any]:
    """The JSON message in a line."""
    message: dict[str, Any] = json.loads(line)
    return message
