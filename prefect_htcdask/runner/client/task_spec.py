"""What it takes to submit a task run's Dask task again, kept until its final state is in hand.

A graph that goes to the scheduler as the connection breaks is lost without a word, and a scheduler may have forgotten a
client that stayed away. The upstream tasks of what has to be submitted again come from where they are: the scheduler
has them still, this process has their states, or they are submitted again themselves.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import cloudpickle
from dask.utils import apply
from distributed.utils import import_term

from prefect_htcdask.compat.dask import Alias, DataNode, GraphTask, List

RUN_CALL = "prefect_htcdask.worker.run_task.run_call"
LOADS = "pickle.loads"
BATCH = 2000
"""Tasks that are submitted again in one graph at most."""


_numbering = threading.Lock()
_last_number = 0


def next_number() -> int:
    """The place of a submit in the order of all, in every process: it grows with each, and is near the time in ns.

    Tasks that submit tasks do so from many processes, and their tasks share one queue.
    """
    global _last_number
    with _numbering:
        _last_number = max(_last_number + 1, time.time_ns())
        return _last_number


class SharedData(NamedTuple):
    """Parameters that all calls of a `map` share, too large for anything but a Dask task of their own."""

    key: str
    blob: bytes


class SendOptions(NamedTuple):
    """How a graph was sent: the annotations of `dask.annotate`, and the Dask resources that each task asks for."""

    annotations: Mapping[str, Any]
    resources: Mapping[str, float] | None


class TaskSpec:
    """One submitted Dask task: all that differs from task to task, with what is shared beside it.

    Args:
        key: of the Dask task.
        envelope: where the scheduler holds the envelope.
        payload: the pickled `worker.call.Call`.
        shared: the parameters that calls share: pickled, where the scheduler holds them, or a task of their own.
        upstreams: the tasks whose states it needs, in order; only the key of one that has no such description.

    Attributes:
        number: its place in the order in which tasks were submitted.
        options: how it is sent.
        sent: whether it has left this process, or never will.
    """

    __slots__ = ("__weakref__", "envelope", "key", "number", "options", "payload", "sent", "shared", "upstreams")

    def __init__(
        self,
        key: str,
        envelope: tuple[str, ...],
        payload: bytes,
        shared: bytes | tuple[str, ...] | SharedData | None,
        upstreams: tuple[TaskSpec | str, ...],
    ) -> None:
        self.number = next_number()
        self.key = key
        self.envelope = envelope
        self.payload = payload
        self.shared = shared
        self.upstreams = upstreams
        self.options = NO_OPTIONS
        self.sent = False

    def upstream_keys(self) -> list[str]:
        """The keys of the tasks whose states it needs."""
        return [one if isinstance(one, str) else one.key for one in self.upstreams]

    def node(self, final_state_of: Mapping[str, str] | None = None) -> GraphTask:
        """The node of a Dask graph, which names nothing but functions of Dask itself.

        Args:
            final_state_of: keys of nodes that stand for upstream tasks, by the keys of those.
        """
        instead = final_state_of or {}
        upstream: Any = [Alias(instead.get(key, key)) for key in self.upstream_keys()]
        shared: Any = Alias(self.shared.key) if isinstance(self.shared, SharedData) else self.shared
        return GraphTask(
            self.key,
            apply,
            GraphTask(None, import_term, RUN_CALL),
            List(self.envelope, self.payload, shared, List(*upstream) if upstream else []),
        )


NO_OPTIONS = SendOptions({}, None)


class Graph(NamedTuple):
    """A Dask graph to send, its keys, and how it is sent.

    What a later graph needs is among the keys: somebody has to want it until that one has come.
    """

    nodes: dict[str, Any]
    keys: list[str]
    options: SendOptions


def tasks_to_resubmit(
    lost: Iterable[TaskSpec], known: Collection[str], final_state_of: Callable[[str], bool]
) -> list[TaskSpec]:
    """What has to be submitted for these tasks to run.

    Args:
        lost: tasks that the scheduler does not know.
        known: keys of tasks that it knows.
        final_state_of: whether this process has the state in which a task, given by its key, ended; it is sent along.

    Returns:
        the tasks, in the order in which they were first submitted.
    """
    todo = list(lost)
    found: dict[str, TaskSpec] = {}
    while todo:
        spec = todo.pop()
        if spec.key in found:
            continue
        found[spec.key] = spec
        for upstream in spec.upstreams:
            key = upstream if isinstance(upstream, str) else upstream.key
            # Of one that is known by its key alone, the state in hand is asked for all the same: it goes along.
            if key not in known and not final_state_of(key) and isinstance(upstream, TaskSpec):
                todo.append(upstream)
    # The ids of task runs grow with time, but not within a millisecond.
    return sorted(found.values(), key=lambda spec: spec.number)


def graphs(specs: Iterable[TaskSpec], states: Mapping[str, Any], batch: int = BATCH) -> Iterator[Graph]:
    """The graphs that bring tasks to the scheduler again, to be sent in this order.

    Args:
        specs: the tasks, each behind those that it needs.
        states: states in hand, by the keys of the tasks that ended in them.
        batch: tasks of one graph at most.
    """
    sent: dict[str, str] = {}
    brought: set[str] = set()
    for options, group in itertools.groupby(specs, key=lambda spec: spec.options):
        members = list(group)
        for start in range(0, len(members), batch):
            nodes: dict[str, Any] = {}
            helpers: list[str] = []
            for spec in members[start : start + batch]:
                for key in spec.upstream_keys():
                    if key in states and key not in sent:
                        # Not under the task's own name, whose durations Dask learns.
                        sent[key] = f"state_in_hand-{key[-36:]}"
                        nodes[sent[key]] = loads_node(sent[key], cloudpickle.dumps(states[key]))
                        helpers.append(sent[key])
                if isinstance(spec.shared, SharedData) and spec.shared.key not in brought:
                    brought.add(spec.shared.key)
                    nodes[spec.shared.key] = DataNode(spec.shared.key, spec.shared.blob)
                    helpers.append(spec.shared.key)
                nodes[spec.key] = spec.node(sent)
            tasks = [key for key in nodes if key not in helpers]
            yield Graph(nodes, [*tasks, *helpers], options)


def loads_node(key: str, blob: bytes) -> GraphTask:
    """The node of a Dask graph whose value is what was pickled."""
    return GraphTask(key, apply, GraphTask(None, import_term, LOADS), List(blob))
