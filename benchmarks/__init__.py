"""Benchmarks: each measures ours and its peers in one run, and prints one JSON line."""
