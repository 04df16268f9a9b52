"""Fixtures of all tests; the real parts they need are in the modules named here."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator

# Its plugin would else compile it as a run of few tests ends, where CPython 3.11 fails if a collected object raises
# meanwhile, as a Gateway of dask_gateway does.
import hypothesis.internal.observability  # noqa: F401
import pytest
from hypothesis import settings
from prefect.server.api.server import SubprocessASGIServer

from prefect_htcdask.embedded import endpoint

# How long an example takes says nothing here: pools and servers run beside it.
settings.register_profile("beside-daemons", settings.get_profile(settings.get_current_profile_name()), deadline=None)
settings.load_profile("beside-daemons")

pytest_plugins = [
    "tests.support.artifacts",
    "tests.support.cluster_fixtures",
    "tests.support.file_order",
    "tests.support.own_pool",
    "tests.support.pool_fixtures",
    "tests.support.prefect_fixtures",
    "tests.support.wire",
]


def pytest_configure(config: pytest.Config) -> None:
    """Have the processes that tests start take SIGINT.

    A shell starts what it puts into the background with SIGINT ignored (POSIX, "Asynchronous Lists"), and every child
    inherits that: Ctrl-C could not be tested in a run that a script started with ``&``.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Look for no garbage while test modules are imported, and later not among what they imported: it stays."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


STARTED_BY = {
    "embedded": "pool",
    "prefect_server": "prefect_api",
    "own_prefect_server": "prefect_api",
    "local_pool": "local_pool",
}
"""What a fixture starts, as the marks say it."""

STARTS_SOMETHING = {*STARTED_BY.values(), "daemons", "faults", "faults_long", "soak"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by what their fixtures start."""
    for item in items:
        for name in getattr(item, "fixturenames", ()):
            if name in STARTED_BY:
                item.add_marker(STARTED_BY[name])


@pytest.fixture(autouse=True)
def no_daemon_without_a_mark(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuse a pool or Prefect server to a test whose marks do not say that it starts one: `make check` runs it."""
    if not any(request.node.get_closest_marker(mark) for mark in STARTS_SOMETHING):

        def refuse(*args: object, **named: object) -> None:
            pytest.fail("this test starts a pool or Prefect server, and has no mark that says so (tests/conftest.py)")

        monkeypatch.setattr(endpoint, "_launch", refuse)
        monkeypatch.setattr(SubprocessASGIServer, "start", refuse)
    yield
