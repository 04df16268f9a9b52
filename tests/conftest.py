"""Fixtures of all tests; the real parts they need are in the modules named here."""

from __future__ import annotations

import signal

# Its plugin would else compile it as a run of few tests ends, where CPython 3.11 fails if a collected object raises
# meanwhile, as a Gateway of dask_gateway does.
import hypothesis.internal.observability  # noqa: F401
import pytest
from hypothesis import settings

# How long an example takes says nothing here: pools and servers run beside it.
settings.register_profile("beside-daemons", settings.get_profile(settings.get_current_profile_name()), deadline=None)
settings.load_profile("beside-daemons")

pytest_plugins = ["tests.support.cluster_fixtures", "tests.support.pool_fixtures", "tests.support.prefect_fixtures"]


def pytest_configure(config: pytest.Config) -> None:
    """Have the processes that tests start take SIGINT.

    A shell starts what it puts into the background with SIGINT ignored (POSIX, "Asynchronous Lists"), and every child
    inherits that: Ctrl-C could not be tested in a run that a script started with ``&``.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
