"""What runs in a worker job: its start, the Dask worker, and Prefect's task runs on it."""
