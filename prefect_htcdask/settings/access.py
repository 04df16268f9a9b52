"""Settings of access: which Dask Gateway and which HTCondor pool, and how to log in to them."""

from __future__ import annotations

from typing import ClassVar

from prefect.settings.base import PrefectBaseSettings, build_settings_config
from pydantic import Field, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from prefect_htcdask.settings.worker import Duration, InputPath, StatePath

ENV_PREFIX = "PREFECT_INTEGRATIONS_HTCDASK_"


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
    credentials_block: str | None = Field(
        default=None,
        min_length=1,
        description="Name of a Prefect block of the type HTCDask Gateway Credentials, which holds the password or "
        "token in their place, so that a deployment carries no secret. The block's user name counts where `username` "
        "is unset.",
    )

    @model_validator(mode="after")
    def _the_secret_has_one_source(self) -> GatewaySettings:
        for name in ("password", "token"):
            if self.credentials_block is not None and getattr(self, name) is not None:
                raise ValueError(_two_sources("gateway", self.credentials_block, name))
        return self


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
    config_file: InputPath = Field(
        default=None, description="HTCondor configuration file (CONDOR_CONFIG). Unset: HTCondor's own search."
    )
    token_file: InputPath = Field(
        default=None,
        description="File with an IDTOKEN for the schedd and collector; readable by its owner only.",
    )
    credentials_block: str | None = Field(
        default=None,
        min_length=1,
        description="Name of a Prefect block of the type HTCDask HTCondor Credentials, which holds an IDTOKEN in "
        "place of `token_file`, so that a deployment carries no secret.",
    )
    directory: StatePath = Field(
        default=None,
        description="Where the workers' logs and, while a cluster lives, their staged input are kept, each cluster's "
        "in a directory of its own; what else is there is left alone. A relative path counts from the home directory, "
        "wherever a flow, a hook or a command runs. Unset: the user's state directory.",
    )
    keep_logs: Duration = Field(default=7 * 86400.0, description="How long the workers' logs are kept.")
    spool: bool = Field(
        default=False,
        description="Spool the workers' input to the schedd: needed where the schedd cannot read this host's files.",
    )

    @model_validator(mode="after")
    def _the_token_has_one_source(self) -> CondorSettings:
        if self.credentials_block is not None and self.token_file is not None:
            raise ValueError(_two_sources("condor", self.credentials_block, "token_file"))
        return self


def _two_sources(group: str, block: str, other: str) -> str:
    """That a secret is given twice, without the secret."""
    return (
        f"{group}.credentials_block = {block!r} ({ENV_PREFIX}{group.upper()}_CREDENTIALS_BLOCK) and {group}.{other} "
        f"({ENV_PREFIX}{group.upper()}_{other.upper()}) are both set; leave one of them out"
    )
