"""The real Prefect server that tests run against."""
