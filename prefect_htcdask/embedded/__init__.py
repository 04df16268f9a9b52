"""A personal HTCondor pool and loopback Dask Gateway for a machine that has neither."""
