"""The command ``prefect-htcdask``."""

from prefect_htcdask.cli import jobs  # noqa: F401  its commands register with the application
from prefect_htcdask.cli.app import app

__all__ = ["app"]
