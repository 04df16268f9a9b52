"""Which Prefect API knows a flow run, in words that anybody may read: they stand in the ads of its worker jobs.

One user of HTCondor may have a test server and a production server. A flow run that one does not know may be the
other's: no sweep may take its jobs for left over.
"""

from __future__ import annotations

import os

import httpx
from prefect.settings import get_current_settings

from prefect_htcdask.utils.net import is_loopback


def current_api() -> str:
    """The API that this process uses, as `api_identity` and `ephemeral_identity` name it; empty where that is unknown.

    The settings of a flow's process and of a sweep of the same profile give the same.
    """
    settings = get_current_settings()
    host = os.uname().nodename
    if settings.api.url:
        return api_identity(str(settings.api.url), host)
    database = settings.server.database.connection_url
    return ephemeral_identity(database.get_secret_value(), host) if database is not None else ""


def api_identity(url: str, host: str) -> str:
    """The name of the API at an address.

    Args:
        url: its address. What it may hold of a login, before the host or as a query, is left out.
        host: the name of this host, which an address on loopback means nothing without.

    Returns:
        the address, with the host's name where it needs that; empty where it is no address. The name of a name is the
        same.
    """
    if " on " in url:
        return url
    try:
        given = httpx.URL(url)
    except httpx.InvalidURL:
        return ""
    plain = str(given.copy_with(username=None, password=None, query=None, fragment=None)).rstrip("/")
    return f"{plain} on {host}" if is_loopback(plain) else plain


def ephemeral_identity(database: str, host: str) -> str:
    """The name of the API that Prefect starts where no address is set: each time at another port, on one database.

    Args:
        database: SQLAlchemy's URL of the database.
        host: the name of this host; files of the same name on two hosts are two databases.

    Returns:
        the database's address; empty for one in memory, which no other process has.
    """
    from sqlalchemy.engine import URL, make_url  # of no use to a process that has an API's address

    given = make_url(database)
    if ":memory:" in (given.database or ""):
        return ""
    plain = str(URL.create(given.drivername, host=given.host, port=given.port, database=given.database))
    return f"{plain} on {host}" if given.host is None or is_loopback(given.host) else plain
