"""Settings: what they accept, and what they say to what they do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_htcdask.gateway import HTCGatewayCluster
from prefect_htcdask.settings import (
    WORKERS_VARIABLE,
    HTCDaskSettings,
    SettingsError,
    WorkerGroupSettings,
    load_settings,
)

PREFIX = "PREFECT_INTEGRATIONS_HTCDASK_"


@pytest.mark.parametrize(
    ("given_size", "size"), [("2 GiB", 2**31), ("500 MB", 500_000_000), (1024, 1024), ("1e3", 1000), ("0", 0)]
)
def test_sizes_as_dask_users_write_them(given_size: Any, size: int) -> None:
    assert load_settings(worker={"memory": given_size}).worker.memory == size


@pytest.mark.parametrize(
    ("given_time", "seconds"), [("90 s", 90), ("5 minutes", 300), (7, 7), ("1.5 h", 5400), ("250ms", 0.25)]
)
def test_durations_as_dask_users_write_them(given_time: Any, seconds: float) -> None:
    assert load_settings(adaptive={"residence": given_time}).adaptive.residence == seconds


@given(st.integers(0, 2**50))
def test_a_size_in_bytes_is_itself(size: int) -> None:
    assert load_settings(worker={"disk": size}).worker.disk == size


@pytest.mark.parametrize(
    ("group", "field", "value", "words"),
    [
        ("worker", "memory", "lots", ["'lots' is no size", "2 GiB"]),
        ("worker", "memory", "-1 GiB", ["negative"]),
        ("worker", "disk", [], ["no size"]),
        ("worker", "cpus", 0, ["greater than or equal to 1"]),
        ("worker", "cpus", "many", ["integer"]),
        ("worker", "start_timeout", "soon", ["'soon' is no duration", "90 s"]),
        ("adaptive", "residence", "-3 s", ["no duration"]),
        ("adaptive", "interval", 0, ["greater than 0"]),
        ("adaptive", "residence", float("nan"), ["no duration"]),
        ("lease", "duration", "inf", ["no duration"]),
        ("lease", "duration", 1, ["greater than or equal to 5"]),
    ],
)
@pytest.mark.parametrize("way", ["argument", "environment"])
def test_a_wrong_value_is_named_with_its_variable_and_a_remedy(
    group: str, field: str, value: Any, words: list[str], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = f"{PREFIX}{group}_{field}".upper()
    arguments: dict[str, Any] = {}
    if way == "argument":
        arguments = {group: {field: value}}
    else:
        monkeypatch.setenv(variable, str(value))
    with pytest.raises(SettingsError) as caught:
        load_settings(**arguments)
    text = str(caught.value)
    for word in [f"{group}.{field}", variable, *words]:
        assert word in text, text


def test_minimum_above_maximum() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(adaptive={"minimum": 5, "maximum": 2})
    text = str(caught.value)
    assert "adaptive.minimum = 5" in text and "adaptive.maximum = 2" in text and "lower the minimum" in text


def test_a_lease_that_would_run_out_between_two_looks() -> None:
    with pytest.raises(SettingsError, match=r"adaptive\.interval = 120 s .* lease\.duration = 180 s.*; lower it"):
        load_settings(adaptive={"interval": "2 minutes"})
    settings = load_settings(adaptive={"interval": "2 minutes"}, lease={"duration": "4 minutes"})
    # Nor is it forgotten where more is said of the workers.
    cluster: Any = object.__new__(HTCGatewayCluster)
    cluster._prepare(settings, None, None, None, {"cpus": 2}, None)
    assert (cluster.settings.lease.duration, cluster.specs["default"].cpus) == (240.0, 2)


def test_a_scheduler_outlives_the_lease_of_its_workers() -> None:
    assert load_settings().lease.scheduler_duration == 1800
    assert load_settings(lease={"duration": "1 hour"}).lease.scheduler_duration == 36000
    assert load_settings(lease={"scheduler": "12 hours"}).lease.scheduler_duration == 43200
    with pytest.raises(SettingsError, match=r"lease\.scheduler = 60 s is below lease\.duration = 180 s.*; raise it"):
        load_settings(lease={"scheduler": "1 minute"})


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(worker={"memory": "lots", "cpus": 0}, lease={"duration": 1}, engine={})
    text = str(caught.value)
    assert all(word in text for word in ("worker.memory", "worker.cpus", "lease.duration", "'engine'"))


def test_an_unknown_field_is_an_error() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(worker={"ram": "2 GiB"})
    assert "worker.ram" in str(caught.value) and "memory" in str(caught.value)


def test_a_secret_is_never_shown() -> None:
    settings = load_settings(gateway={"password": "hunter2", "token": "t0ps3cret"})
    assert "hunter2" not in repr(settings) and "t0ps3cret" not in repr(settings)
    with pytest.raises(SettingsError) as caught:
        load_settings(gateway={"password": ["hunter2"]})
    assert "hunter2" not in str(caught.value)


def test_arguments_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}WORKER_CPUS", "3")
    monkeypatch.setenv(f"{PREFIX}WORKER_MEMORY", "3 GiB")
    worker = load_settings(worker={"cpus": 2, "memory": None}).worker
    assert (worker.cpus, worker.memory) == (2, 3 * 2**30)


def test_every_field_has_a_description() -> None:
    for name, group in HTCDaskSettings.model_fields.items():
        assert group.description, name
        model = WorkerGroupSettings if name == "workers" else group.annotation
        for field, info in model.model_fields.items():  # type: ignore[union-attr]
            assert info.description, f"{name}.{field}"


GROUPS = {"cpu": {"cpus": 4, "maximum": 50}, "gpu": {"gpus": 1, "requirements": "CUDACapability > 7"}}


def test_worker_groups_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKERS_VARIABLE, json.dumps(GROUPS))
    monkeypatch.setenv(f"{PREFIX}WORKER_MEMORY", "3 GiB")
    monkeypatch.setenv(f"{PREFIX}ADAPTIVE_MINIMUM", "2")
    groups = load_settings(adaptive={"maximum": 7}).groups
    assert list(groups) == ["cpu", "gpu"], "in their order"
    cpu, gpu = groups.values()
    assert (cpu.cpus, cpu.gpus, cpu.minimum, cpu.maximum) == (4, 0, 0, 50)
    assert (gpu.cpus, gpu.gpus, gpu.minimum, gpu.maximum) == (1, 1, 0, 7)
    assert cpu.memory == gpu.memory == 3 * 2**30, "what a group does not say is as in worker"
    assert gpu.requirements == "CUDACapability > 7" and cpu.requirements is None


def test_worker_groups_from_prefect_toml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    table = "integrations.htcdask.workers"
    (tmp_path / "prefect.toml").write_text(f"[{table}.small]\nmemory = '1 GiB'\n[{table}.big]\nmemory = '9 GiB'\n")
    assert {name: group.memory for name, group in load_settings().groups.items()} == {
        "small": 2**30,
        "big": 9 * 2**30,
    }


def test_worker_groups_given_take_the_place_of_configured_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKERS_VARIABLE, json.dumps(GROUPS))
    settings = load_settings(workers={"gpu": {"gpus": 2}, "own": {}})
    assert list(settings.groups) == ["gpu", "own"]
    assert (settings.groups["gpu"].gpus, settings.groups["gpu"].requirements) == (2, None)
    assert load_settings(**settings.stated()) == settings
    assert list(HTCDaskSettings(workers={"a": {"cpus": 3}}).groups) == ["a"]
    assert list(HTCDaskSettings().groups) == ["cpu", "gpu"]


def test_one_group_without_a_word_of_groups() -> None:
    (name, group), *more = load_settings(worker={"cpus": 3}, adaptive={"minimum": 1, "maximum": 9}).groups.items()
    assert (name, more) == ("default", [])
    assert (group.cpus, group.minimum, group.maximum) == (3, 1, 9)
    assert load_settings(workers={"x": {}}, adaptive={"minimum": 1}).groups["x"].minimum == 1
    assert load_settings(workers={"x": {}, "y": {}}, adaptive={"minimum": 1}).groups["x"].minimum == 0


def test_a_group_s_own_image_is_what_it_runs_in() -> None:
    groups = load_settings(worker={"container_image": "a.sif"}, workers={"a": {}, "b": {"image": "site/b:1"}}).groups
    assert groups["a"].container_image == "a.sif"
    assert (groups["b"].container_image, groups["b"].image) == (None, "site/b:1")


@pytest.mark.parametrize(
    ("workers", "words"),
    [
        ({}, ["workers", WORKERS_VARIABLE, "{}", "leave it out"]),
        ([], ["workers", WORKERS_VARIABLE, "mapping"]),
        ({"gpu": {"ram": "2 GiB"}}, ["workers.gpu.ram is no setting", "memory"]),
        ({"gpu": {"memory": "lots"}}, ["workers.gpu.memory", WORKERS_VARIABLE, "'lots' is no size", "2 GiB"]),
        ({"gpu": {"minimum": 3, "maximum": 2}}, ["workers.gpu.minimum = 3", "workers.gpu.maximum = 2", "lower"]),
        ({"gpu": {"minimum": 101}}, ["workers.gpu.minimum = 101", "maximum = 100", "adaptive.maximum"]),
        ({"gpu": {"minimum": -1}}, ["workers.gpu.minimum", "-1"]),
        ({"gpu": {"maximum": 0}}, ["workers.gpu.maximum", "0"]),
        ({"gpu": 3}, ["workers.gpu", "3", "no mapping"]),
        ({"my group": {}}, ["'my group'", "letters"]),
        ({"": {}}, ["''", "letters"]),
        ({"x" * 41: {}}, ["x" * 41, "1 to 40"]),
        ({"a": {"resources": {"GPU": 0}}}, ["workers.a.resources", "'GPU' = 0", "above 0"]),
        ({"a": {"resources": {"GPU": "some"}}}, ["workers.a.resources.GPU", "'some'"]),
        ({"a": {"lifetime": "1 h", "lifetime_stagger": "2 h"}}, ["workers.a.lifetime_stagger", "lower it"]),
        ({"a": {"cpus": 0}, "b": {"gpus": -1}}, ["workers.a.cpus", "workers.b.gpus"]),
    ],
)
@pytest.mark.parametrize("way", ["argument", "environment"])
def test_worker_groups_that_cannot_be(
    workers: Any, words: list[str], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {}
    if way == "argument":
        arguments["workers"] = workers
    else:
        monkeypatch.setenv(WORKERS_VARIABLE, json.dumps(workers))
    with pytest.raises(SettingsError) as caught:
        load_settings(**arguments)
    text = str(caught.value)
    for word in words:
        assert word in text, text
    assert "\n" not in text


def test_worker_groups_that_are_no_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKERS_VARIABLE, "cpu,gpu")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    text = str(caught.value)
    assert WORKERS_VARIABLE in text and "'cpu,gpu'" in text and "JSON" in text


def test_a_lifetime_needs_a_smaller_stagger() -> None:
    with pytest.raises(SettingsError, match=r"worker\.lifetime_stagger"):
        load_settings(worker={"lifetime": "1 h", "lifetime_stagger": "1 h"})
    assert load_settings(worker={"lifetime_stagger": "1 h"}).worker.lifetime is None


@pytest.mark.parametrize("name", ["PREFECT_API_KEY", "PREFECT_INTEGRATIONS_HTCDASK_GATEWAY_PASSWORD"])
def test_a_login_is_no_environment_of_a_job(name: str) -> None:
    """It would stand in the job's ad."""
    with pytest.raises(SettingsError, match=rf"worker\.environment .*: {name} is a secret") as caught:
        load_settings(worker={"environment": {"FINE": "1", name: "hunter2"}})
    assert "hunter2" not in str(caught.value)
