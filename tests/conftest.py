"""Fixtures of all tests; the real parts they need are in the modules named here."""

pytest_plugins = ["tests.cluster_fixtures", "tests.pool_fixtures", "tests.prefect_fixtures"]
