"""Prefect flows on HTCondor workers behind a Dask Gateway."""
