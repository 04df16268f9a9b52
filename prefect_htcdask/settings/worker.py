"""What a worker is, and a group of workers: the part of the settings that a worker job is made of."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar

from dask.utils import parse_bytes, parse_timedelta
from prefect.settings.base import PrefectBaseSettings, build_settings_config
from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict


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


def _state_path(value: str | None) -> str | None:
    # From a working directory, hook, sweep and `jobs --logs`, which run elsewhere, would look elsewhere.
    return os.path.normpath(Path.home() / Path(value).expanduser()) if value else None


def _input_path(value: str | None) -> str | None:
    return os.path.abspath(Path(value).expanduser()) if value else None


StatePath = Annotated[str | None, AfterValidator(_state_path)]
"""An absolute path where files are kept, the same in each process of a user: a relative one counts from the home."""

InputPath = Annotated[str | None, AfterValidator(_input_path)]
"""An absolute path of a file that is read: a relative one counts from the working directory as it is now."""


def _resources(value: dict[str, float]) -> dict[str, float]:
    for name, amount in value.items():
        if not name:
            raise ValueError("'' is no name of a resource; write one such as 'licence'")
        if not math.isfinite(amount) or amount <= 0:
            raise ValueError(f"{name!r} = {amount!r} is no amount of a resource; write a number above 0")
    return value


def _public(value: dict[str, str]) -> dict[str, str]:
    for name in value:
        if name.upper() in _SECRET_VARIABLES:
            raise ValueError(
                f"{name} is a secret, and the environment of a job stands in its ad, for every user of the pool to "
                "read; leave it out: workers get what they need of it by themselves"
            )
    return value


_SECRET_VARIABLES = frozenset(
    {
        "PREFECT_API_KEY",
        "PREFECT_API_AUTH_STRING",
        "PREFECT_INTEGRATIONS_HTCDASK_GATEWAY_PASSWORD",
        "PREFECT_INTEGRATIONS_HTCDASK_GATEWAY_TOKEN",
        "JUPYTERHUB_API_TOKEN",
    }
)

Duration = Annotated[float, BeforeValidator(_duration)]
"""Seconds, from a number or a string such as ``"90 s"`` (`dask.utils.parse_timedelta`)."""

Resources = Annotated[dict[str, float], AfterValidator(_resources)]
"""Amounts of Dask resources, by their names."""

GROUP_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")

GroupName = Annotated[str, Field(pattern=f"^{GROUP_NAME.pattern}$")]
"""Name of a worker group, as it stands in job ads and in the names of directories."""


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
    environment: Annotated[dict[str, str], AfterValidator(_public)] = Field(
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
        description="When a worker should be gone by itself, counted from the start of its job. It takes no new tasks "
        "for the last part of it (`lifetime_stagger`), and is replaced meanwhile. A task in hand is never cut off for "
        "it: a worker leaves late rather than have its task run again. Set it below the pool's limit, by the time that "
        "your longest task takes: at that limit HTCondor ends the job, and the task runs again from its beginning. "
        "Unset: a worker stays as long as it is used.",
    )
    lifetime_stagger: Duration | None = Field(
        default=None,
        description="Each worker takes its last task at a moment of its own before the end of its lifetime: between "
        "this time and a quarter of it before, spread so that not all leave at once. Unset: a tenth of `lifetime`.",
    )
    resources: Resources = Field(
        default_factory=dict,
        description="Dask resources that each worker offers, such as {'licence': 1}, for tasks that ask for them; "
        "{'GPU': gpus} is offered in any case where gpus > 0.",
    )

    @property
    def threads(self) -> int:
        """Tasks that a worker runs at once."""
        return self.nthreads or self.cpus


class WorkerGroupSettings(WorkerSettings):
    """One of several kinds of workers. A field that is not set is as in `worker`.

    It is read as a part of `workers` only, never from environment variables of its own.
    """

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        extra="forbid",
        toml_file=None,
        pyproject_toml_table_header=None,  # type: ignore[typeddict-item]
    )

    minimum: int | None = Field(
        default=None,
        ge=0,
        description="Workers of the group kept even when nothing is queued. Unset: 0; with one group adaptive.minimum.",
    )
    maximum: int | None = Field(
        default=None, ge=1, description="Workers of the group at most. Unset: adaptive.maximum."
    )

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The values given are the only ones."""
        return (init_settings,)
