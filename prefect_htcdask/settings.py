"""Settings of prefect_htcdask, by Prefect's own convention.

Every field can be given as an environment variable ``PREFECT_INTEGRATIONS_HTCDASK_<GROUP>_<FIELD>``, in
``prefect.toml`` under ``[integrations.htcdask.<group>]``, or in a Prefect profile. Sizes and durations are what
Dask users write: ``"2 GiB"``, ``"90 s"``.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

from dask.utils import parse_bytes, parse_timedelta
from prefect.settings.base import PrefectBaseSettings, build_settings_config
from pydantic import BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import SettingsConfigDict

ENV_PREFIX = "PREFECT_INTEGRATIONS_HTCDASK_"


class SettingsError(ValueError):
    """A setting has a value that cannot work. The message names the setting, its value and the remedy."""


def _size(value: Any) -> int:
    try:
        size = int(parse_bytes(value))
    except (TypeError, ValueError, AttributeError) as exc:
        raise ValueError(f"{value!r} is no size; write a number with a unit, such as '2 GiB' or '500 MB'") from exc
    if size < 0:
        raise ValueError(f"{value!r} is negative; a size is zero or more bytes")
    return size


def _duration(value: Any) -> float:
    try:
        seconds = float(parse_timedelta(value, default="seconds"))
    except (TypeError, ValueError, KeyError, AttributeError) as exc:
        raise ValueError(
            f"{value!r} is no duration; write a number with a unit, such as '90 s' or '5 minutes'"
        ) from exc
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"{value!r} is no duration that can be waited for; write zero or more seconds")
    return seconds


Size = Annotated[int, BeforeValidator(_size)]
"""Bytes, from an int or a string such as ``"2 GiB"`` (`dask.utils.parse_bytes`)."""

Duration = Annotated[float, BeforeValidator(_duration)]
"""Seconds, from a number or a string such as ``"90 s"`` (`dask.utils.parse_timedelta`)."""


class GatewaySettings(PrefectBaseSettings):
    """Which Dask Gateway gives the schedulers, and how to log in to it."""

    model_config: ClassVar[SettingsConfigDict] = build_settings_config(("integrations", "htcdask", "gateway"))

    address: str | None = Field(
        default=None,
        description="URL of the Dask Gateway, such as https://gateway.example.org. Unset: Dask's own "
        "configuration (gateway.address), else the embedded gateway.",
    )
    proxy_address: str | None = Field(
        default=None,
        description="host:port at which the gateway's proxy takes scheduler (TLS) connections, from the flow's "
        "host and from workers. Unset: the host and port of `address`.",
    )
    public_address: str | None = Field(
        default=None, description="URL under which a browser reaches the gateway; for dashboard links."
    )
    auth: str | None = Field(
        default=None,
        description="How to authenticate: 'basic', 'jupyterhub', 'kerberos', or an importable GatewayAuth class. "
        "Unset: 'basic' where a password is set, 'jupyterhub' where a token is set, else Dask's configuration.",
    )
    username: str | None = Field(default=None, description="User name for basic authentication. Unset: the login name.")
    password: SecretStr | None = Field(default=None, description="Password for basic authentication.")
    token: SecretStr | None = Field(default=None, description="JupyterHub API token.")


class CondorSettings(PrefectBaseSettings):
    """Which HTCondor pool runs the workers, and how to reach its schedd."""

    model_config: ClassVar[SettingsConfigDict] = build_settings_config(("integrations", "htcdask", "condor"))

    collector: str | None = Field(
        default=None,
        description="Address of the pool's collector (host or host:port). Unset: HTCondor's configuration.",
    )
    schedd: str | None = Field(
        default=None,
        description="Name of the schedd to submit to. Unset: the local schedd of the configuration.",
    )
    config_file: str | None = Field(
        default=None, description="HTCondor configuration file (CONDOR_CONFIG). Unset: HTCondor's own search."
    )
    token_file: str | None = Field(
        default=None,
        description="File with an IDTOKEN for the schedd and collector; readable by its owner only.",
    )
    directory: str | None = Field(
        default=None,
        description="Where the workers' logs and, while a cluster lives, their staged input are kept. Unset: the "
        "user's state directory.",
    )
    keep_logs: Duration = Field(default=7 * 86400.0, description="How long the workers' logs are kept.")
    spool: bool = Field(
        default=False,
        description="Spool the workers' input to the schedd: needed where the schedd cannot read this host's files.",
    )


class WorkerSettings(PrefectBaseSettings):
    """What one worker is: the HTCondor job that it is submitted as."""

    model_config: ClassVar[SettingsConfigDict] = build_settings_config(("integrations", "htcdask", "worker"))

    cpus: int = Field(default=1, ge=1, description="Cores requested for each worker job (request_cpus).")
    memory: Size = Field(default=2 * 1024**3, description="Memory requested for each worker job (request_memory).")
    disk: Size = Field(default=1024**3, description="Scratch disk requested for each worker job (request_disk).")
    gpus: int = Field(default=0, ge=0, description="GPUs requested for each worker job (request_gpus).")
    nthreads: int | None = Field(
        default=None, ge=1, description="Tasks that a worker runs at once. Unset: as many as it has cpus."
    )
    image: str | None = Field(
        default=None,
        description="Container image of scheduler and workers: given to the gateway as its cluster option `image`, "
        "and to HTCondor as docker://IMAGE unless `container_image` says otherwise.",
    )
    container_image: str | None = Field(
        default=None,
        description="Image that the worker jobs run in: a .sif file, a directory, or a docker:// or oras:// address "
        "(HTCondor's container_image).",
    )
    python: str | None = Field(
        default=None,
        description="Python interpreter of the worker jobs. Unset: this process's own, or `python3` in a container.",
    )
    environment: dict[str, str] = Field(
        default_factory=dict,
        description="Environment variables of the worker jobs. They stand in the job ad: no secret belongs here.",
    )
    requirements: str | None = Field(
        default=None, description="ClassAd expression that a slot must meet (requirements)."
    )
    accounting_group: str | None = Field(
        default=None, description="HTCondor accounting group that the workers count against."
    )
    priority: int = Field(default=0, description="Job priority among this user's jobs (priority); higher first.")
    extra_submit: dict[str, str] = Field(
        default_factory=dict,
        description="Further submit commands, such as {'+ProjectName': '\"cms\"'}; they may not replace ours.",
    )
    start_timeout: Duration = Field(
        default=600.0,
        description="How long the first worker may take to start before the flow fails; 0 waits for ever.",
    )
    lifetime: Duration | None = Field(
        default=None,
        description="A worker leaves by itself, drained, after this time. Unset: it stays as long as used.",
    )


class AdaptiveSettings(PrefectBaseSettings):
    """How the number of workers follows the number of queued tasks."""

    model_config: ClassVar[SettingsConfigDict] = build_settings_config(("integrations", "htcdask", "adaptive"))

    minimum: int = Field(default=0, ge=0, description="Workers kept even when nothing is queued.")
    maximum: int = Field(default=100, ge=1, description="Workers at most, whatever is queued.")
    interval: Duration = Field(default=1.0, gt=0, description="Time between two looks at the queue of tasks.")
    residence: Duration = Field(default=30.0, description="How long a worker stays idle before it is removed.")
    max_idle_jobs: int = Field(
        default=200,
        ge=1,
        description="Worker jobs that may wait in the HTCondor queue at once, for politeness.",
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


class LeaseSettings(PrefectBaseSettings):
    """How long jobs and schedulers live when nobody renews them any more."""

    model_config: ClassVar[SettingsConfigDict] = build_settings_config(("integrations", "htcdask", "lease"))

    duration: Duration = Field(
        default=180.0,
        ge=5,
        description="The schedd removes worker jobs, and the scheduler ends, this long after the last renewal.",
    )
    lost_schedd: Duration = Field(
        default=600.0,
        description="A worker whose schedd is gone leaves after this time (job_lease_duration).",
    )


class EmbeddedSettings(PrefectBaseSettings):
    """The personal HTCondor pool and gateway that are started where nothing is configured."""

    model_config: ClassVar[SettingsConfigDict] = build_settings_config(("integrations", "htcdask", "embedded"))

    enabled: bool = Field(
        default=True,
        description="Start a personal pool and gateway where none is configured. False: an error instead.",
    )
    directory: str | None = Field(
        default=None,
        description="Where the embedded pool and gateway keep their state. Unset: the user's state directory.",
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


class HTCDaskSettings(PrefectBaseSettings):
    """All settings of prefect_htcdask.

    Raises:
        pydantic.ValidationError: from the constructor; `load_settings` turns it into one clear `SettingsError`.
    """

    model_config: ClassVar[SettingsConfigDict] = build_settings_config(("integrations", "htcdask"))

    gateway: GatewaySettings = Field(default_factory=GatewaySettings, description="The Dask Gateway.")
    condor: CondorSettings = Field(default_factory=CondorSettings, description="The HTCondor pool.")
    worker: WorkerSettings = Field(default_factory=WorkerSettings, description="The worker jobs.")
    adaptive: AdaptiveSettings = Field(default_factory=AdaptiveSettings, description="Adaptive scaling.")
    lease: LeaseSettings = Field(default_factory=LeaseSettings, description="Leases of jobs and schedulers.")
    embedded: EmbeddedSettings = Field(
        default_factory=EmbeddedSettings,
        description="The personal pool and gateway of a machine that has neither.",
    )


def load_settings(**overrides: Any) -> HTCDaskSettings:
    """Read the settings from environment, ``prefect.toml`` and profile, with `overrides` on top.

    Args:
        overrides: groups, each a mapping of fields, such as ``worker={"memory": "4 GiB"}``. A field that is
            `None` is left as it is configured.

    Returns:
        the validated settings.

    Raises:
        SettingsError: one message that names every wrong setting, its value and what to do.
    """
    groups: dict[str, PrefectBaseSettings] = {}
    problems: list[str] = []
    for name, field in HTCDaskSettings.model_fields.items():
        group_type = field.annotation
        assert isinstance(group_type, type) and issubclass(group_type, PrefectBaseSettings)
        given = {k: v for k, v in (overrides.pop(name, None) or {}).items() if v is not None}
        unknown = sorted(set(given) - set(group_type.model_fields))
        if unknown:
            problems += [
                f"{name}.{field} is no setting; there are {', '.join(group_type.model_fields)}" for field in unknown
            ]
            continue
        try:
            groups[name] = group_type(**given)
        except ValidationError as exc:
            problems += [_describe(name, dict(error)) for error in exc.errors()]
    problems += [
        f"{name!r} is no group of settings; there are {', '.join(HTCDaskSettings.model_fields)}" for name in overrides
    ]
    if problems:
        raise SettingsError("; ".join(problems))
    return HTCDaskSettings.model_validate(groups)


def _describe(group: str, error: dict[str, Any]) -> str:
    """One problem, as ``worker.memory (PREFECT_..._WORKER_MEMORY) = 'lots': 'lots' is no size; …``."""
    message = str(error["msg"]).removeprefix("Value error, ")
    location = [str(part) for part in error["loc"]]
    if not location:
        return message
    variable = f"{ENV_PREFIX}{group}_{location[0]}".upper()
    secret = location[0] in {"password", "token"}
    shown = "" if secret else f" = {error.get('input')!r}"
    return f"setting {group}.{'.'.join(location)} ({variable}){shown}: {message}"
