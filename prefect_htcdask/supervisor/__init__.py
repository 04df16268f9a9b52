"""The process that owns a cluster's workers: it submits, tracks, scales, renews and removes them.

It is started by the flow's process, outlives it just to clean up, and is the only one that calls the HTCondor bindings
(they hold the GIL while a schedd does not answer).
"""
