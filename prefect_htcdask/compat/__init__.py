"""What this package uses of Prefect, Dask and dask_gateway that is private to them: gone through at each release."""
