"""The command ``prefect-htcdask``."""

import gc

# What imports make is no garbage: to look for some meanwhile is a quarter of a command's CPU time.
gc.disable()

from prefect_htcdask.cli import jobs  # noqa: E402, F401  its commands register with the application
from prefect_htcdask.cli.app import app  # noqa: E402

gc.freeze()
gc.enable()

__all__ = ["app"]
