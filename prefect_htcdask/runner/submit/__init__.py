"""From a task and its parameters to Dask keys: descriptions, large arguments, worker groups, code."""
