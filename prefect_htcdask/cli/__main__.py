"""``python -m prefect_htcdask.cli``."""

from prefect_htcdask.cli import app

app()
