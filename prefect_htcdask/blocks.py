"""Credentials as Prefect blocks: the Prefect server keeps them, encrypted, and settings name them.

Prefect loads this module whenever it looks for block types, so it needs nothing but Prefect.
"""

from __future__ import annotations

from typing import ClassVar

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, HttpUrl, SecretStr, field_validator, model_validator

_LOGO = HttpUrl(
    "https://raw.githubusercontent.com/PrefectHQ/prefect/420d0d6a78bb6df1fc18bcf188fdad43c1d22ea9"
    "/assets/block-logos/secret.png"
)
"""That of Prefect's own `Secret` block, which every UI of Prefect shows."""

_DOCUMENTATION = HttpUrl("https://docs.prefect.io/integrations")

_TOKEN_PARTS = 3


class HTCDaskGatewayCredentials(Block):
    """How to log in to a Dask Gateway: a password for basic authentication, or a JupyterHub API token.

    Attributes:
        username: User name for basic authentication; the login name of the flow's process by default.
        password: Password for basic authentication.
        token: JupyterHub API token, in place of a password.

    Example:
        Save credentials once, and name them in the setting `gateway.credentials_block`:
        ```python
        from prefect_htcdask import HTCDaskGatewayCredentials

        HTCDaskGatewayCredentials(username="anne", password="correct horse").save("BLOCK_NAME", overwrite=True)
        credentials = HTCDaskGatewayCredentials.load("BLOCK_NAME")
        print(credentials.username, credentials.password)
        ```
    """

    # A wrong value is a secret too.
    model_config: ClassVar[ConfigDict] = ConfigDict(hide_input_in_errors=True)

    _block_type_name = "HTCDask Gateway Credentials"
    _logo_url = _LOGO
    _documentation_url = _DOCUMENTATION

    username: str | None = Field(
        default=None,
        description="User name for basic authentication; the login name of the flow's process by default.",
    )
    password: SecretStr | None = Field(default=None, description="Password for basic authentication.")
    token: SecretStr | None = Field(default=None, description="JupyterHub API token, in place of a password.")

    @model_validator(mode="after")
    def _there_is_one_secret(self) -> HTCDaskGatewayCredentials:
        # A form of the UI sends what was left empty as an empty text.
        given = [name for name in ("password", "token") if revealed(getattr(self, name))]
        if len(given) != 1:
            raise ValueError(
                "password and token are both given; leave one of them empty"
                if given
                else "neither password nor token is given; give one of them"
            )
        return self


class HTCDaskCondorCredentials(Block):
    """An IDTOKEN for an HTCondor pool: what `condor_token_create` or `condor_token_fetch` prints.

    Attributes:
        token: The IDTOKEN, whose identity the worker jobs belong to.

    Example:
        Save a token once, and name it in the setting `condor.credentials_block`:
        ```python
        from prefect_htcdask import HTCDaskCondorCredentials

        HTCDaskCondorCredentials(token="eyJhbGciOi.eyJzdWIiOi.Xp0bYf").save("BLOCK_NAME", overwrite=True)
        credentials = HTCDaskCondorCredentials.load("BLOCK_NAME")
        print(credentials.token)
        ```
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(hide_input_in_errors=True)

    _block_type_name = "HTCDask HTCondor Credentials"
    _logo_url = _LOGO
    _documentation_url = _DOCUMENTATION

    token: SecretStr = Field(
        default=...,
        description="IDTOKEN for the schedd and collector, as condor_token_create or condor_token_fetch prints it.",
    )

    @field_validator("token", mode="after")
    @classmethod
    def _is_one_token(cls, value: SecretStr) -> SecretStr:
        token = value.get_secret_value().strip()
        if len(token.split(".")) != _TOKEN_PARTS or not token.isascii() or len(token.split()) != 1:
            raise ValueError(
                "this is no IDTOKEN: one is a single word of three parts with dots between them; give the text that "
                "condor_token_create or condor_token_fetch prints, not the name of its file"
            )
        return SecretStr(token)


def revealed(secret: SecretStr | None) -> str:
    """The text of a secret; empty where there is none."""
    return secret.get_secret_value() if secret is not None else ""


__all__ = ["HTCDaskCondorCredentials", "HTCDaskGatewayCredentials", "revealed"]
