"""What several rooms need and no room owns: the Prefect API's client, addresses, proxies. It stays below 400 lines."""
