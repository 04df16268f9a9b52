"""Which source each setting comes from: environment, ``prefect.toml``, profile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from prefect.settings.base import PrefectBaseSettings
from prefect.settings.sources import (
    EnvFilterSettingsSource,
    FilteredDotEnvSettingsSource,
    PrefectTomlConfigSettingsSource,
    ProfileSettingsTomlLoader,
    PyprojectTomlConfigSettingsSource,
)
from pydantic import SecretStr
from pydantic_settings import InitSettingsSource

from prefect_htcdask.settings import ENV_PREFIX, ConfiguredWorkers, HTCDaskSettings

_SOURCES: dict[type, str] = {
    EnvFilterSettingsSource: "environment variable {variable}",
    FilteredDotEnvSettingsSource: "{variable} in .env",
    PrefectTomlConfigSettingsSource: "prefect.toml",
    PyprojectTomlConfigSettingsSource: "pyproject.toml",
    ProfileSettingsTomlLoader: "{variable} in the Prefect profile",
}

_GIVEN = "given by the caller"
_MAY_HOLD_SECRETS = frozenset({"workers.workers", "worker.environment", "worker.extra_submit"})
"""Mappings of which the values are not shown."""


def stated_settings(settings: HTCDaskSettings) -> Iterator[tuple[str, str, str]]:
    """The settings that are no defaults: name, value as it may be shown, and source.

    A secret's value is never among them. The secrets of a credentials block are named by it.
    """
    for group_name in type(settings).model_fields:
        group = getattr(settings, group_name)
        if not isinstance(group, PrefectBaseSettings):
            continue
        sources = _sources(type(group), group_name)
        for field in sorted(group.model_fields_set):
            name = f"{group_name}.{field}"
            yield name, _shown(name, getattr(group, field)), sources.get(field, _GIVEN)
        block = getattr(group, "credentials_block", None)
        if block is not None:
            yield f"{group_name}'s secret", "(secret)", f"Prefect block {block!r}"
    if settings.workers:
        source = _sources(ConfiguredWorkers, "").get("workers", _GIVEN)
        yield "workers", ", ".join(settings.workers), source


def _sources(group: type[PrefectBaseSettings], name: str) -> dict[str, str]:
    """For each field that a source gives: which, in Prefect's order."""
    nothing = InitSettingsSource(group, {})
    found: dict[str, str] = {}
    for source in group.settings_customise_sources(group, nothing, nothing, nothing, nothing):
        label = _SOURCES.get(type(source))
        if label is None:
            continue
        for field in source():
            variable = f"{ENV_PREFIX}{name}_{field}".upper() if name else f"{ENV_PREFIX}{field}".upper()
            found.setdefault(field, label.format(variable=variable))
    return found


def _shown(name: str, value: Any) -> str:
    if isinstance(value, SecretStr):
        return "(secret)"
    if isinstance(value, Mapping) and name in _MAY_HOLD_SECRETS:
        return f"{{{', '.join(map(str, value))}: …}}"
    if isinstance(value, str) and "://" in value:
        parts = urlsplit(value)
        if parts.username or parts.password:
            value = urlunsplit(parts._replace(netloc=f"(secret)@{parts.netloc.rpartition('@')[2]}"))
    return repr(value) if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
