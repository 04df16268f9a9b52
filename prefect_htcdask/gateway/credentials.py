"""Fetches the credentials that settings name: what a block holds goes the same way as a secret in the settings.

Nothing of a block is written down here, and none is fetched that no setting names.
"""

from __future__ import annotations

from typing import Any, TypeVar

import httpx
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.settings import get_current_settings
from pydantic import ValidationError

from prefect_htcdask.blocks import HTCDaskCondorCredentials, HTCDaskGatewayCredentials, revealed
from prefect_htcdask.settings import ENV_PREFIX, CondorSettings, GatewaySettings, SettingsError


def gateway_login(settings: GatewaySettings) -> GatewaySettings:
    """The settings, with the login that the block holds which they name.

    Raises:
        SettingsError: there is no such block, or Prefect's API cannot be asked.
    """
    assert settings.credentials_block is not None
    block = _load(HTCDaskGatewayCredentials, settings.credentials_block, "gateway")
    login = {
        "username": settings.username or block.username or None,
        "password": block.password if revealed(block.password) else None,
        "token": block.token if revealed(block.token) else None,
    }
    return settings.model_copy(update=login)


def condor_token(settings: CondorSettings) -> str:
    """The IDTOKEN that the block holds which the settings name.

    Raises:
        SettingsError: there is no such block, or Prefect's API cannot be asked.
    """
    assert settings.credentials_block is not None
    return _load(HTCDaskCondorCredentials, settings.credentials_block, "condor").token.get_secret_value()


_Credentials = TypeVar("_Credentials", HTCDaskGatewayCredentials, HTCDaskCondorCredentials)


def _load(kind: type[_Credentials], name: str, group: str) -> _Credentials:
    """Fetch a block, from wherever this is called: the caller waits, in an event loop too."""
    named = f"{group}.credentials_block = {name!r} ({ENV_PREFIX}{group.upper()}_CREDENTIALS_BLOCK)"
    asked = f"the Prefect API at {get_current_settings().api.url or 'a temporary server (PREFECT_API_URL is not set)'}"
    load: Any = kind.load
    try:
        block: _Credentials = load(name, _sync=True)
    except ValidationError as exc:
        why = "; ".join(str(error["msg"]).removeprefix("Value error, ") for error in exc.errors(include_input=False))
        raise SettingsError(f"{named}: the block cannot be used: {why}. Edit it in Prefect's UI (Blocks)") from None
    except (ValueError, httpx.HTTPError, PrefectException, RuntimeError, OSError) as exc:
        if isinstance(exc.__cause__, ObjectNotFound):
            raise SettingsError(
                f"{named}: {asked} has no block of that name and of the type {kind.get_block_type_name()}. Make it in "
                "the UI (Blocks), where `prefect block register -m prefect_htcdask` adds the type, or with "
                f"{kind.__name__}(...).save({name!r})"
            ) from exc
        raise SettingsError(
            f"{named}: {asked} could not be asked for the block: {str(exc) or type(exc).__name__}. Check "
            "PREFECT_API_URL, the login of PREFECT_API_KEY or PREFECT_API_AUTH_STRING, and that the server runs"
        ) from exc
    return block
