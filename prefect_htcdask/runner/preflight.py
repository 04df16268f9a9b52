"""Checks before work is submitted: each finds one thing that would fail later, far away and unclearly."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

from distributed import Client

from prefect_htcdask.errors import VersionMismatchError
from prefect_htcdask.settings import SettingsError
from prefect_htcdask.utils.net import is_loopback

CHECKED_PACKAGES = ("dask", "distributed", "prefect", "prefect_htcdask")

NOT_AT_SCHEDULERS = ("prefect", "prefect_htcdask")
"""Packages that a scheduler does without: what it runs of ours is sent by value."""


def check_api_reachable(url: str | None, workers_are_local: bool) -> None:
    """Refuse a Prefect API that workers on other hosts cannot reach.

    Args:
        url: the API's address as the flow's process uses it.
        workers_are_local: whether every worker runs on this host.

    Raises:
        SettingsError: the address is none, or this host's own while workers may run elsewhere.
    """
    if not url:
        raise SettingsError(
            "PREFECT_API_URL is not set and no temporary server runs: workers could not report their task runs; "
            "set it to the address of a Prefect server"
        )
    if not workers_are_local and is_loopback(url):
        raise SettingsError(
            f"PREFECT_API_URL = {url!r} is this host's own address, which workers on other hosts cannot reach; set it "
            "to an address of the Prefect server that the whole pool can reach, such as http://THIS_HOST:4200/api "
            "with a server started by `prefect server start --host 0.0.0.0`"
        )


def check_versions(client: Client) -> None:
    """Refuse versions of Python, dask, distributed, Prefect or this package that differ between a cluster's parts.

    Python counts by its minor version; Prefect and this package count on workers only, since a scheduler needs neither.
    Worker jobs bring this package in the flow's version; other Dask workers (`cluster=`, `address=`) have one of their
    own, or none.

    Raises:
        VersionMismatchError: says which part runs which version.
    """
    compare_versions(cast("dict[str, Any]", client.get_versions(packages=list(NOT_AT_SCHEDULERS))))


def compare_versions(versions: dict[str, Any]) -> None:
    """The comparison of `check_versions`, of what `distributed.Client.get_versions` says.

    Raises:
        VersionMismatchError: says which part runs which version.
    """
    mine = _of_interest(versions["client"])
    problems: list[str] = []
    parts: list[tuple[str, dict[str, Any]]] = [("the scheduler", versions["scheduler"])]
    seen: set[tuple[tuple[str, str | None], ...]] = set()
    for address, worker in versions["workers"].items():
        fingerprint = tuple(sorted(_of_interest(worker).items()))
        if fingerprint not in seen:
            seen.add(fingerprint)
            parts.append((f"the worker at {address}", worker))
    for name, part in parts:
        theirs = _of_interest(part)
        for what, version in mine.items():
            if what in NOT_AT_SCHEDULERS and name == "the scheduler":
                continue
            if theirs.get(what) != version:
                problems.append(f"{name} has {what} {theirs.get(what) or '(none)'}, the flow has {version}")
    if problems:
        raise VersionMismatchError(
            "versions do not match: " + "; ".join(problems) + ". Give flow, scheduler and workers the same versions, "
            "by one environment or image (settings worker.image, worker.container_image, worker.python)"
        )


def _of_interest(part: dict[str, Any] | None) -> dict[str, str | None]:
    if not part:
        return {}
    python = str(part["host"].get("python", "")).split(".")[:2]
    found: dict[str, str | None] = {"python": ".".join(python)}
    found.update({name: part["packages"].get(name) for name in CHECKED_PACKAGES})
    return found


def warn_of_local_storage(
    result_store: Any, persists: bool, workers_are_local: bool, logger: logging.Logger | logging.LoggerAdapter[Any]
) -> bool:
    """Warn where results are persisted to a path that workers on other hosts do not share.

    Args:
        result_store: the flow run's `prefect.results.ResultStore`.
        persists: whether anything of the flow run is persisted.
        workers_are_local: whether every worker runs on this host.
        logger: where to.

    Returns:
        whether there was something to warn of.
    """
    from prefect.filesystems import LocalFileSystem

    storage = getattr(result_store, "result_storage", None)
    if workers_are_local or not persists or not isinstance(storage, LocalFileSystem):
        return False
    path = Path(storage.basepath or "~/.prefect/storage").expanduser()
    logger.warning(
        "Results are persisted to the local path %s, which workers on other hosts may not share: a result that one "
        "of them wrote is lost to everyone else. Set PREFECT_DEFAULT_RESULT_STORAGE_BLOCK, or result_storage of flow "
        "and tasks, to remote storage, or PREFECT_RESULTS_LOCAL_STORAGE_PATH to a shared path.",
        path,
    )
    return True
