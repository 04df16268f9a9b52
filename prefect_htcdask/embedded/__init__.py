"""A personal HTCondor pool and a stock Dask Gateway on loopback, for a machine that has neither."""

from prefect_htcdask.embedded.endpoint import (
    EmbeddedEndpoint,
    ensure_running,
    find,
    scheduler_log_tail,
    status,
    stop,
)
from prefect_htcdask.embedded.errors import EmbeddedError

__all__ = ["EmbeddedEndpoint", "EmbeddedError", "ensure_running", "find", "scheduler_log_tail", "status", "stop"]
