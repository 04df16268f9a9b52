"""Settings of prefect_htcdask, by Prefect's own convention.

Every field can be given as an environment variable ``PREFECT_INTEGRATIONS_HTCDASK_<GROUP>_<FIELD>``, in
``prefect.toml`` under ``[integrations.htcdask.<group>]``, or in a Prefect profile. Sizes and durations are what
Dask users write: ``"2 GiB"``, ``"90 s"``. Several kinds of workers are given by ``workers``, a mapping of names to
fields: as JSON in ``PREFECT_INTEGRATIONS_HTCDASK_WORKERS``, or under ``[integrations.htcdask.workers.<name>]``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from prefect.settings.base import PrefectBaseSettings, build_settings_config
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as SourceError

from prefect_htcdask.settings.access import ENV_PREFIX, CondorSettings, GatewaySettings
from prefect_htcdask.settings.lease import LeaseSettings
from prefect_htcdask.settings.report import ReportSettings
from prefect_htcdask.settings.worker import (
    GROUP_NAME,
    Duration,
    GroupName,
    Size,
    StatePath,
    WorkerGroupSettings,
    WorkerSettings,
)

WORKERS_VARIABLE = f"{ENV_PREFIX}WORKERS"
ONLY_GROUP = "default"
"""Name of the worker group where `workers` gives none."""


class SettingsError(ValueError):
    """A setting has a value that cannot work. The message names the setting, its value and the remedy."""


class AdaptiveSettings(PrefectBaseSettings):
    """How the number of workers follows the number of queued tasks."""

    model_config: ClassVar[SettingsConfigDict] = build_settings_config(("integrations", "htcdask", "adaptive"))

    minimum: int = Field(default=0, ge=0, description="Workers kept even when nothing is queued.")
    maximum: int = Field(default=100, ge=1, description="Workers at most, whatever is queued.")
    interval: Duration = Field(default=1.0, gt=0, description="Time between two looks at the queue of tasks.")
    residence: Duration = Field(
        default=4.0,
        description="How long a worker stays idle before it is removed, or up to half as long again (10 s at most) "
        "where others are about to go too. Each worker costs this much more when work runs out; raise it where you "
        "submit wave after wave, to about as long as jobs wait in your pool.",
    )
    max_idle_jobs: int = Field(
        default=5000,
        ge=1,
        description="Worker jobs that may wait in the HTCondor queue at once, while adapting; never more, as a "
        "courtesy to the pool. More are submitted as those start.",
    )
    max_failures: int = Field(
        default=3,
        ge=1,
        description="Workers that may die at start in a row before submission stops and the flow fails.",
    )

    @model_validator(mode="after")
    def _minimum_is_not_above_maximum(self) -> AdaptiveSettings:
        if self.minimum > self.maximum:
            raise ValueError(
                f"adaptive.minimum = {self.minimum} is above adaptive.maximum = {self.maximum}; "
                "raise the maximum or lower the minimum"
            )
        return self


def _listed(value: Any) -> Any:
    """A list, also from the text of an environment variable: with commas, as Prefect's own, or JSON."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError as exc:
            raise ValueError(f"{value!r} is no JSON; write names with commas between them") from exc
    return [name.strip() for name in value.split(",")] if value.strip() else []


def _inside(patterns: list[str]) -> list[str]:
    for pattern in patterns:
        if not pattern.strip() or pattern.startswith(("/", "~")) or ".." in pattern.split("/"):
            raise ValueError(
                f"{pattern!r} is no pattern of files below the flow's directory; write one relative to it, such as "
                "'cuts.yaml' or 'tables/*.csv'"
            )
    return patterns


class CodeSettings(PrefectBaseSettings):
    """What travels to workers beside the flow's code."""

    model_config: ClassVar[SettingsConfigDict] = build_settings_config(("integrations", "htcdask", "code"))

    data_files: Annotated[list[str], NoDecode, BeforeValidator(_listed), AfterValidator(_inside)] = Field(
        default_factory=list,
        description="Data files that are sent to workers beside the flow's Python sources: names, directories or "
        "patterns as in a .gitignore, relative to the directory of the flow's file, such as ['cuts.yaml', "
        "'tables/*.csv']. What may be a secret is never sent, whatever is written here.",
    )


class EmbeddedSettings(PrefectBaseSettings):
    """The personal HTCondor pool and gateway that are started where nothing is configured."""

    model_config: ClassVar[SettingsConfigDict] = build_settings_config(("integrations", "htcdask", "embedded"))

    enabled: bool = Field(
        default=True,
        description="Start a personal pool and gateway where none is configured. False: an error instead.",
    )
    directory: StatePath = Field(
        default=None,
        description="Where the embedded pool and gateway keep their state: a directory of their own. A relative path "
        "counts from the home directory. Unset: the user's state directory.",
    )
    idle_timeout: Duration = Field(
        default=1800.0,
        description="The embedded pool and gateway stop after this time without jobs or clusters; 0: never.",
    )
    slots: int | None = Field(
        default=None,
        ge=1,
        description="Cores that the embedded pool offers, more than the machine has if wished. "
        "Unset: the machine's, but at least 4, so that a small machine runs several workers too.",
    )
    memory: Size | None = Field(default=None, description="Memory that the embedded pool offers. Unset: the machine's.")
    use_configured_pool: bool = Field(
        default=True,
        description="Use the HTCondor pool that this machine is configured for, where its schedd answers, and "
        "start only a gateway. False: always a personal pool.",
    )


class ConfiguredWorkers(PrefectBaseSettings):
    """The worker groups as environment, ``prefect.toml`` or profile give them, unchecked."""

    model_config: ClassVar[SettingsConfigDict] = build_settings_config(("integrations", "htcdask"))

    workers: dict[str, Any] = Field(default_factory=dict, description="Fields of each worker group, by its name.")


def _configured_workers() -> Any:
    return ConfiguredWorkers().workers


class HTCDaskSettings(PrefectBaseSettings):
    """All settings of prefect_htcdask.

    Raises:
        pydantic.ValidationError: from the constructor; `load_settings` turns it into one clear error.
    """

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(extra="ignore")

    gateway: GatewaySettings = Field(default_factory=GatewaySettings, description="The Dask Gateway.")
    condor: CondorSettings = Field(default_factory=CondorSettings, description="The HTCondor pool.")
    worker: WorkerSettings = Field(default_factory=WorkerSettings, description="The worker jobs.")
    workers: dict[GroupName, WorkerGroupSettings] = Field(
        default_factory=_configured_workers,
        description="Several kinds of workers, by the names of the groups, the first being the default one: mappings "
        "of fields of `worker`, and of `minimum` and `maximum`. A field that is not given is as in `worker`.",
    )
    adaptive: AdaptiveSettings = Field(default_factory=AdaptiveSettings, description="Adaptive scaling.")
    lease: LeaseSettings = Field(default_factory=LeaseSettings, description="Leases of jobs and schedulers.")
    report: ReportSettings = Field(default_factory=ReportSettings, description="What the Prefect UI shows.")
    code: CodeSettings = Field(default_factory=CodeSettings, description="What travels with the flow's code.")
    embedded: EmbeddedSettings = Field(
        default_factory=EmbeddedSettings,
        description="The personal pool and gateway of a machine that has neither.",
    )

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Each group reads its own sources; were they read here too, worker groups given would be mixed with others."""
        return (init_settings,)

    @property
    def groups(self) -> dict[str, WorkerGroupSettings]:
        """The worker groups with each field filled in, the default group first; one called "default" at least."""
        few = len(self.workers) < 2
        unset = {
            **{name: getattr(self.worker, name) for name in WorkerSettings.model_fields},
            "minimum": self.adaptive.minimum if few else 0,
            "maximum": self.adaptive.maximum,
        }
        filled = {}
        for name, group in (self.workers or {ONLY_GROUP: WorkerGroupSettings()}).items():
            stated = {field: getattr(group, field) for field in group.model_fields_set}
            if "image" in stated:
                # The group's own image says what it runs in, not the one that `worker` says.
                stated.setdefault("container_image", None)
            filled[name] = WorkerGroupSettings.model_construct(**{**unset, **stated})
        return filled

    @model_validator(mode="after")
    def _groups_can_be(self) -> HTCDaskSettings:
        for name, group in self.groups.items():
            prefix = f"workers.{name}" if self.workers else "worker"
            assert group.minimum is not None and group.maximum is not None
            if group.minimum > group.maximum:
                raise ValueError(
                    f"{prefix}.minimum = {group.minimum} is above {prefix}.maximum = {group.maximum}; raise the "
                    "maximum or lower the minimum (unset, they are 0 and adaptive.maximum)"
                )
            if group.lifetime_stagger is not None and group.lifetime_stagger >= (group.lifetime or math.inf):
                raise ValueError(
                    f"{prefix}.lifetime_stagger = {group.lifetime_stagger:g} s is not below {prefix}.lifetime = "
                    f"{group.lifetime:g} s; lower it, or give a longer lifetime"
                )
        return self

    @model_validator(mode="after")
    def _lease_is_renewed_in_time(self) -> HTCDaskSettings:
        # Each look at the queue renews the lease, and one may fail.
        if self.adaptive.interval > self.lease.duration / 2:
            raise ValueError(
                f"adaptive.interval = {self.adaptive.interval:g} s is above half of lease.duration = "
                f"{self.lease.duration:g} s, which each look at the queue renews; lower it, or give a longer lease"
            )
        return self

    def stated(self) -> dict[str, dict[str, Any]]:
        """What was said and is no default, as `load_settings` takes it."""
        said = {
            name: value.model_dump(exclude_unset=True)
            for name in type(self).model_fields
            if isinstance(value := getattr(self, name), PrefectBaseSettings)
        }
        if self.workers:
            said["workers"] = {name: group.model_dump(exclude_unset=True) for name, group in self.workers.items()}
        return said


def load_settings(**overrides: Any) -> HTCDaskSettings:
    """Read the settings from environment, ``prefect.toml`` and profile, with `overrides` on top.

    Args:
        overrides: groups, each a mapping of fields, such as ``worker={"memory": "4 GiB"}``; `workers` is a mapping of
            such mappings, and takes the place of all worker groups that are configured. A field that is `None` is left
            as it is configured.

    Returns:
        the validated settings.

    Raises:
        SettingsError: one message that names every wrong setting, its value and what to do.
    """
    groups: dict[str, Any] = {}
    problems: list[str] = []
    workers = overrides.pop("workers", None)
    for name, field in HTCDaskSettings.model_fields.items():
        if name == "workers":
            continue
        group_type = field.annotation
        assert isinstance(group_type, type) and issubclass(group_type, PrefectBaseSettings)
        groups[name] = _checked(name, group_type, overrides.pop(name, None) or {}, problems)
    groups["workers"] = _worker_groups(workers, problems)
    problems += [
        f"{name!r} is no group of settings; there are {', '.join(HTCDaskSettings.model_fields)}" for name in overrides
    ]
    if not problems:
        try:
            return HTCDaskSettings.model_validate(groups)
        except ValidationError as exc:
            problems += [_describe("workers", dict(error)) for error in exc.errors()]
    raise SettingsError("; ".join(problems))


def _checked(
    name: str, group_type: type[PrefectBaseSettings], values: Mapping[str, Any], problems: list[str]
) -> PrefectBaseSettings | None:
    """One group of settings; what is wrong with it is added to `problems`."""
    given = {k: v for k, v in values.items() if v is not None}
    unknown = sorted(set(given) - set(group_type.model_fields))
    if unknown:
        problems += [
            f"{name}.{field} is no setting; there are {', '.join(group_type.model_fields)}" for field in unknown
        ]
        return None
    try:
        return group_type(**given)
    except ValidationError as exc:
        problems += [_describe(name, dict(error)) for error in exc.errors()]
        return None


def _worker_groups(given: Any, problems: list[str]) -> dict[str, PrefectBaseSettings | None]:
    """The worker groups given, or else configured; what is wrong with them is added to `problems`."""
    example = "{'cpu': {'cpus': 4}, 'gpu': {'gpus': 1, 'maximum': 2}}"
    if given is None:
        try:
            configured = ConfiguredWorkers()
        except (SourceError, ValidationError):
            value = os.environ.get(WORKERS_VARIABLE)
            shown = "" if value is None else f" = {value!r}"
            problems.append(
                f"setting workers ({WORKERS_VARIABLE}){shown} is no mapping of worker groups; write JSON such as "
                + example.replace("'", '"')
            )
            return {}
        if "workers" not in configured.model_fields_set:
            return {}
        given = configured.workers
    if not isinstance(given, Mapping) or not given:
        problems.append(
            f"setting workers ({WORKERS_VARIABLE}) = {given!r} names no worker group; write a mapping such as "
            f"{example}, or leave it out for one group made by `worker`"
        )
        return {}
    groups = {}
    for name, values in given.items():
        if not isinstance(name, str) or not GROUP_NAME.fullmatch(name):
            problems.append(
                f"setting workers ({WORKERS_VARIABLE}): {name!r} cannot be the name of a worker group; use 1 to 40 "
                "letters, digits, - and _"
            )
        elif not isinstance(values, Mapping):
            problems.append(
                f"setting workers.{name} ({WORKERS_VARIABLE}) = {values!r} is no mapping of fields; write one such as "
                "{'cpus': 4}, or {} for what `worker` says"
            )
        else:
            groups[name] = _checked(f"workers.{name}", WorkerGroupSettings, values, problems)
    return groups


def _describe(group: str, error: dict[str, Any]) -> str:
    """One problem, as ``worker.memory (PREFECT_..._WORKER_MEMORY) = 'lots': 'lots' is no size; …``."""
    message = str(error["msg"]).removeprefix("Value error, ")
    location = [str(part) for part in error["loc"]]
    if not location:
        return message
    variable = WORKERS_VARIABLE if group.startswith("workers") else f"{ENV_PREFIX}{group}_{location[0]}".upper()
    secret = location[0] in {"password", "token", "environment"}
    shown = "" if secret else f" = {error.get('input')!r}"
    return f"setting {group}.{'.'.join(location)} ({variable}){shown}: {message}"


__all__ = [
    "ENV_PREFIX",
    "ONLY_GROUP",
    "WORKERS_VARIABLE",
    "AdaptiveSettings",
    "CondorSettings",
    "EmbeddedSettings",
    "GatewaySettings",
    "HTCDaskSettings",
    "LeaseSettings",
    "ReportSettings",
    "SettingsError",
    "WorkerGroupSettings",
    "WorkerSettings",
    "load_settings",
]
