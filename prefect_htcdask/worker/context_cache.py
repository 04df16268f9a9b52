"""What many task runs have in common, fetched from the scheduler and hydrated once per worker process.

The *envelope* of a task holds the task and says where the context is that it runs in, which all tasks of a flow run
share (`context`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cloudpickle

from prefect_htcdask.worker.context import Prototypes, hydrate
from prefect_htcdask.worker.metadata_cache import MetadataCache, MetadataKey

MAX_ENVELOPES = 128
MAX_CONTEXTS = 16
"""Of flow runs; a task run that submits further ones makes one of its own for these."""

MAX_BYTES = 64 * 1024**2
"""Pickled, for each kind: functions carry along what they close over."""


@dataclass(frozen=True)
class Envelope:
    """A task, and where its context is."""

    task: Any
    context: MetadataKey


def _open(blob: bytes) -> Envelope:
    content: dict[str, Any] = cloudpickle.loads(blob)
    return Envelope(content["task"], content["context"])


envelopes: MetadataCache[Envelope] = MetadataCache(_open, MAX_ENVELOPES, MAX_BYTES)
contexts: MetadataCache[Prototypes] = MetadataCache(hydrate, MAX_CONTEXTS, MAX_BYTES)
