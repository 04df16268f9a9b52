"""The Dask client of a flow run: it sends tasks in batches, and sends again what a lost connection took."""
