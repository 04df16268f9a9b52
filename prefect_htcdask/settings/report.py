"""Settings of what the Prefect UI shows of a flow run's workers, and of the report at its end."""

from __future__ import annotations

from typing import ClassVar

from prefect.settings.base import PrefectBaseSettings, build_settings_config
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from prefect_htcdask.settings.worker import Duration


class ReportSettings(PrefectBaseSettings):
    """What the Prefect UI shows of a flow run's workers, and the report at its end."""

    model_config: ClassVar[SettingsConfigDict] = build_settings_config(("integrations", "htcdask", "report"))

    enabled: bool = Field(
        default=True,
        description="Show the Dask dashboard's address, the progress and the HTCondor jobs as artifacts of the flow "
        "run, and a report at its end. False: neither artifacts nor report files are made.",
    )
    interval: Duration = Field(
        default=5.0,
        ge=5.0,
        description="While a flow run goes on, its artifacts cost the Prefect API one call in this time at most.",
    )
    rows: int = Field(
        default=50, ge=1, le=1000, description="HTCondor jobs that the table of jobs shows at most, the most telling."
    )
    picture: bool = Field(
        default=True,
        description="Keep the report's picture as an SVG file too, beside the workers' logs.",
    )
