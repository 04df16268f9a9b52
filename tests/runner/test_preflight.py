"""Checks before work is submitted."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import distributed
import pytest
from prefect.filesystems import LocalFileSystem
from prefect.results import ResultStore

from prefect_htcdask.errors import VersionMismatchError
from prefect_htcdask.runner.preflight import NOT_AT_SCHEDULERS, compare_versions, warn_of_local_storage


@pytest.fixture(scope="module")
def versions(local_pool: distributed.LocalCluster) -> dict[str, Any]:
    """What a real client, scheduler and two workers say of their versions."""
    with distributed.Client(local_pool, set_as_default=False) as client:
        found: dict[str, Any] = client.get_versions(packages=list(NOT_AT_SCHEDULERS))
        return found


def test_equal_versions_pass(versions: dict[str, Any]) -> None:
    compare_versions(versions)


@pytest.mark.parametrize("package", ["dask", "distributed", "prefect", "prefect_htcdask"])
def test_a_workers_other_version_is_named(versions: dict[str, Any], package: str) -> None:
    changed = copy.deepcopy(versions)
    address = next(iter(changed["workers"]))
    changed["workers"][address]["packages"][package] = "1.2.3"
    with pytest.raises(VersionMismatchError, match=rf"worker at {address} has {package} 1\.2\.3"):
        compare_versions(changed)


def test_the_schedulers_python_counts_by_its_minor_version(versions: dict[str, Any]) -> None:
    changed = copy.deepcopy(versions)
    major, minor, *rest = changed["scheduler"]["host"]["python"].split(".")
    changed["scheduler"]["host"]["python"] = ".".join([major, minor, "99", *rest[1:]])
    compare_versions(changed)
    changed["scheduler"]["host"]["python"] = "3.7.1.final.0"
    with pytest.raises(VersionMismatchError, match=r"the scheduler has python 3\.7"):
        compare_versions(changed)


@pytest.mark.parametrize("package", NOT_AT_SCHEDULERS)
def test_a_scheduler_needs_neither_prefect_nor_this_package(versions: dict[str, Any], package: str) -> None:
    changed = copy.deepcopy(versions)
    changed["scheduler"]["packages"][package] = None
    compare_versions(changed)


def test_workers_without_this_package_are_named(versions: dict[str, Any]) -> None:
    changed = copy.deepcopy(versions)
    address = next(iter(changed["workers"]))
    changed["workers"][address]["packages"]["prefect_htcdask"] = None
    with pytest.raises(VersionMismatchError, match=rf"worker at {address} has prefect_htcdask \(none\)"):
        compare_versions(changed)


@pytest.mark.parametrize(
    ("persists", "local", "warned"), [(True, False, True), (False, False, False), (True, True, False)]
)
def test_local_results_that_others_cannot_read_are_warned_of(
    persists: bool, local: bool, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = ResultStore(result_storage=LocalFileSystem(basepath=str(tmp_path)))
    logger = logging.getLogger("a test of preflight")
    with caplog.at_level("WARNING", logger.name):
        assert warn_of_local_storage(store, persists, local, logger) is warned
    assert ("PREFECT_DEFAULT_RESULT_STORAGE_BLOCK" in caplog.text) is warned
