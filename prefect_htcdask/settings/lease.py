"""Settings of the leases: how long what was started lives when nobody renews it any more."""

from __future__ import annotations

from typing import ClassVar

from prefect.settings.base import PrefectBaseSettings, build_settings_config
from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from prefect_htcdask.settings.worker import Duration

_SCHEDULER_LEASES = 10
"""How many times as long a scheduler lives: it is one process, without which a flow that awakes cannot go on."""


class LeaseSettings(PrefectBaseSettings):
    """How long jobs and schedulers live when nobody renews them any more."""

    model_config: ClassVar[SettingsConfigDict] = build_settings_config(("integrations", "htcdask", "lease"))

    duration: Duration = Field(
        default=180.0,
        ge=5,
        description="The schedd removes worker jobs this long after the last renewal, running ones up to a minute "
        "later; and another process may then take the cluster over.",
    )
    scheduler: Duration | None = Field(
        default=None,
        description="The gateway cluster ends this long after the last renewal, its Dask scheduler with it. Until "
        "then a flow whose host was asleep or cut off goes on, with new workers. Unset: ten times `duration`.",
    )
    lost_schedd: Duration = Field(
        default=600.0,
        description="A worker whose schedd is gone leaves after this time (job_lease_duration).",
    )

    @property
    def scheduler_duration(self) -> float:
        """Seconds without a renewal after which the gateway cluster ends."""
        return _SCHEDULER_LEASES * self.duration if self.scheduler is None else self.scheduler

    @model_validator(mode="after")
    def _the_scheduler_is_not_the_first_to_go(self) -> LeaseSettings:
        if self.scheduler_duration < self.duration:
            raise ValueError(
                f"lease.scheduler = {self.scheduler_duration:g} s is below lease.duration = {self.duration:g} s: "
                "workers would lose their scheduler before their own lease ends; raise it, or leave it out"
            )
        return self
