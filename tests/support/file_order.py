"""The order in which the processes of `make test` take the files of tests: those that take longest come first.

Whoever is free takes the next file; with short ones at the end, all processes end at once.
"""

from __future__ import annotations

import pytest

SECONDS = {"faults": 40, "daemons": 12, "pool": 12, "slow": 10, "local_pool": 3, "prefect_api": 2}
"""What a test with a mark takes, roughly; the first that it has counts. One with none of them takes a twentieth."""


LONG = {
    "tests/end_to_end/test_docs.py": 300,
    "tests/cleanup/test_sweep.py": 200,
    "tests/faults/test_clocks.py": 130,
    "tests/end_to_end/test_demo.py": 100,
    "tests/end_to_end/test_ui.py": 100,
    "tests/cleanup/test_logs.py": 90,
    "tests/end_to_end/test_deployments.py": 80,
    "tests/runner/test_groups.py": 100,
    "tests/runner/test_events.py": 80,
    "tests/runner/test_artifacts.py": 80,
    "tests/cli/test_commands.py": 70,
    "tests/runner/test_large_states.py": 60,
    "tests/end_to_end/test_throughput_contexts.py": 50,
    "tests/end_to_end/test_throughput_transfers.py": 50,
    "tests/end_to_end/test_throughput_parity.py": 50,
}
"""What a file takes where that is far more than its marks say."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files in order by what they take, when their tests have their marks; the order in a file stays."""
    takes: dict[str, float] = {}
    for item in items:
        seconds = next((SECONDS[mark] for mark in SECONDS if item.get_closest_marker(mark)), 0.05)
        takes[_file(item)] = takes.get(_file(item), 0.0) + seconds
    # By their names where it is the same: the processes of xdist have to agree.
    items.sort(key=lambda item: (-LONG.get(_file(item), takes[_file(item)]), _file(item)))


def _file(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]
