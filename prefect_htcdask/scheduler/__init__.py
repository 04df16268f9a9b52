"""What runs on the Dask scheduler: plugins that travel there by value, and so import nothing else of ours."""
