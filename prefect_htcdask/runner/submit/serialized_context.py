"""What the task runs of a flow run have in common, described once and left at the scheduler for its workers.

A task stands there once for as long as it does not change; the context that it runs in (settings, flow run, task run
that submits) once for all tasks.
"""

from __future__ import annotations

import copy
import hashlib
import threading
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Callable
from types import FunctionType
from typing import Any, Protocol, runtime_checkable

import cloudpickle
from distributed import Client
from distributed.protocol.pickle import dumps
from prefect.context import FlowRunContext, SettingsContext, TaskRunContext, serialize_context
from prefect.tasks import Task

from prefect_htcdask.scheduler.worker_groups import Offers
from prefect_htcdask.settings.access import ENV_PREFIX
from prefect_htcdask.worker import flow_logging
from prefect_htcdask.worker.metadata_cache import METADATA_ROOT, MetadataKey

INLINE_LIMIT = 2 * 1024
"""Bytes that are rather sent along than left at the scheduler."""

MAX_DESCRIBED = 64
"""Contexts whose descriptions are remembered; what they describe stays alive for that."""


@runtime_checkable
class RunnerForWorkers(Protocol):
    """A task runner that says what of it workers are to have."""

    def for_workers(self) -> Any:
        """The runner as it travels to workers."""


class ContextPublisher:
    """Those of one live run, which its part of the scheduler's metadata holds.

    Args:
        client: the Dask client of the flow's process, or a worker's own one.
        run_id: names this run's part of the metadata.
        api_url: the Prefect API as workers reach it; put into their settings where the flow has none (an ephemeral
            server).
    """

    def __init__(self, client: Client, run_id: str, api_url: str | None) -> None:
        self._client = client
        self._run_id = run_id
        self._api_url = api_url
        self._lock = threading.Lock()
        self._contexts = _Described()
        self._left: dict[tuple[int, str], tuple[MetadataKey, Callable[[], Any]]] = {}
        self._places: list[MetadataKey] = []
        self._held = 0

    def envelope(self, task: Task[Any, Any], offers: Offers | None) -> MetadataKey:
        """Make sure that the scheduler holds the envelope of `task` in the present context; return where."""
        # A task is an ordinary object that a flow may change between two submits, and so is what its function refers
        # to: its bytes tell. Another object with the same options, as of each round of a loop, has the same bytes;
        # other functions that have may still have a cache each.
        described = cloudpickle.dumps({"task": task, "context": self._context(offers)})
        return self._leave_once(described, _weakly(task))

    def put(self, blob: bytes) -> bytes | MetadataKey:
        """Leave bytes at the scheduler, unless they are few; returns them, or where they are."""
        return blob if len(blob) <= INLINE_LIMIT else self._leave_once(blob)

    def put_within(self, blob: bytes, limit: int, total: int) -> bytes | MetadataKey | None:
        """As `put`, but for more than `limit` bytes, and for what would make it more than `total` of all: `None`."""
        if len(blob) <= INLINE_LIMIT or len(blob) > limit:
            return blob if len(blob) <= INLINE_LIMIT else None
        words = _words(blob)
        known = self._find(words)
        return known or (self._leave(words, blob) if self.held_bytes + len(blob) <= total else None)

    @property
    def held_bytes(self) -> int:
        """What this object has left at the scheduler, in bytes."""
        with self._lock:
            return self._held

    def metadata_keys(self) -> list[MetadataKey]:
        """Where the scheduler holds what this object left there."""
        with self._lock:
            return list(self._places)

    def clear(self) -> None:
        """Remove this run's part of the metadata."""
        with self._lock:
            self._contexts = _Described()
            self._left.clear()
            self._places.clear()
            self._held = 0
        self._client.set_metadata([METADATA_ROOT, self._run_id], None)

    def _leave_once(self, blob: bytes, of: Any = None) -> MetadataKey:
        """Leave bytes at the scheduler, unless they are there; those that describe a function, once for each."""
        words = _words(blob, of)
        return self._find(words, of) or self._leave(words, blob, of)

    def _find(self, words: tuple[int, str], of: Any = None) -> MetadataKey | None:
        with self._lock:
            known = self._left.get(words)
        # The identity may have been another's.
        return known[0] if known is not None and (of is None or known[1]() is of) else None

    def _leave(self, words: tuple[int, str], blob: bytes, of: Any = None) -> MetadataKey:
        # Under a name that no other object gives: it takes away what it has left, and nothing else.
        place = (self._run_id, uuid.uuid4().hex)
        self._client.set_metadata([METADATA_ROOT, *place], blob)
        with self._lock:
            self._held += len(blob)
            self._places.append(place)
            self._left[words] = place, weakref.ref(of) if of is not None else _nothing
        return place

    def _context(self, offers: Offers | None) -> MetadataKey:
        kept = (FlowRunContext.get(), SettingsContext.get(), TaskRunContext.get(), offers)
        identity = tuple(id(one) for one in kept)
        with self._lock:
            known = self._contexts.find(identity)
        if known is not None:
            return known
        place = self._leave_once(self._described_context(offers))
        with self._lock:
            self._contexts.keep(identity, place, kept)
        return place

    def _described_context(self, offers: Offers | None) -> bytes:
        context = serialize_context()
        for varying in ("tags_context", "asset_context"):
            context.pop(varying)
        settings_context = _for_workers(context.pop("settings_context"))
        settings: dict[str, Any] = settings_context.get("settings", {})
        api = settings["api"] = dict(settings.get("api") or {})
        if self._api_url:
            # With an ephemeral server the flow's settings have no address, and every worker would start its own.
            api["url"] = api.get("url") or self._api_url
        flow_run = context["flow_run_context"]
        if flow := flow_run.get("flow"):
            flow_run["flow"] = _as_for_workers(flow)
        parameters = flow_run.pop("parameters", None)
        described = {
            "context": context,
            "settings": cloudpickle.dumps(settings_context) if settings_context else None,
            "parameters": self.put(dumps(parameters)) if parameters is not None else None,
            "client_key": _client_key(api.get("url")),
            "offers": offers,
            "logging": flow_logging.describe(),
        }
        return bytes(cloudpickle.dumps(described))


def _for_workers(settings_context: dict[str, Any]) -> dict[str, Any]:
    """The settings without what only the flow's host needs: logins of gateway and pool, and a server's database."""
    sent = dict(settings_context)
    if profile := sent.get("profile"):
        settings = {
            name: value
            for name, value in profile["settings"].items()
            if not str(name).startswith((ENV_PREFIX, *_DATABASE_VARIABLES))
        }
        sent["profile"] = {**profile, "settings": settings}
    if server := sent.get("settings", {}).get("server"):
        server = {name: value for name, value in server.items() if name != "database"}
        sent["settings"] = {**sent["settings"], "server": server}
    return sent


_DATABASE_VARIABLES = ("PREFECT_SERVER_DATABASE_", "PREFECT_API_DATABASE_")


class _Described:
    """Where descriptions are, by the identities of what they describe, which is kept alive for that."""

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[Any, ...], tuple[MetadataKey, Any]] = OrderedDict()

    def find(self, identity: tuple[Any, ...]) -> MetadataKey | None:
        if identity not in self._entries:
            return None
        self._entries.move_to_end(identity)
        return self._entries[identity][0]

    def keep(self, identity: tuple[Any, ...], place: MetadataKey, kept: Any) -> None:
        self._entries[identity] = place, kept
        while len(self._entries) > MAX_DESCRIBED:
            # The scheduler keeps it: task runs that are still queued fetch it.
            self._entries.popitem(last=False)


def _words(blob: bytes, of: Any = None) -> tuple[int, str]:
    return id(of), hashlib.sha256(blob).hexdigest()


def _nothing() -> None:
    return None


def _weakly(task: Task[Any, Any]) -> Any:
    """The task's function, or the task itself where no weak reference can be made to that."""
    return task.fn if isinstance(task.fn, FunctionType) else task


def _client_key(api_url: str | None) -> str:
    """Names the API, and how the present settings say to come to it, without telling their secrets."""
    current = SettingsContext.get()
    secrets: tuple[Any, ...] = ()
    if current is not None:
        values = current.settings
        key, auth = values.api.key, values.api.auth_string
        secrets = (
            key.get_secret_value() if key else None,
            auth.get_secret_value() if auth else None,
            values.api.tls_insecure_skip_verify,
            str(values.api.ssl_cert_file),
            values.api.enable_http2,
            values.api.request_timeout,
            repr(values.client.model_dump()),
        )
    return hashlib.sha256(repr((api_url, *secrets)).encode()).hexdigest()


def _as_for_workers(flow: Any) -> Any:
    """The flow as workers need it: a runner of ours without settings, which may hold secrets, and without handles."""
    if not isinstance(flow.task_runner, RunnerForWorkers):
        return flow
    sent = copy.copy(flow)
    sent.task_runner = flow.task_runner.for_workers()
    return sent
