"""Settings: what they accept, and what they say to what they do not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_htcdask.settings import HTCDaskSettings, SettingsError, load_settings

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
        for field, info in group.annotation.model_fields.items():  # type: ignore[union-attr]
            assert info.description, f"{name}.{field}"
