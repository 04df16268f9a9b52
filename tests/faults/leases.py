"""Leases of the rows, and how late what they end may be."""

from __future__ import annotations

from prefect_htcdask.settings import ENV_PREFIX

LEASE = 8.0


SCHEDULER_LEASE = 16.0


SHORT_LEASE = {
    f"{ENV_PREFIX}LEASE_DURATION": f"{LEASE:.0f} s",
    f"{ENV_PREFIX}LEASE_SCHEDULER": f"{SCHEDULER_LEASE:.0f} s",
}


LATE = 60.0  # a running job is given a minute more: its shadow hears of a renewal late
