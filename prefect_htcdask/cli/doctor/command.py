"""What the command ``doctor`` does: tries all links, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prefect_htcdask.cli.doctor.checks import Finding, run_checks
from prefect_htcdask.cli.doctor.cluster_checks import Checks
from prefect_htcdask.settings import HTCDaskSettings


def examine(settings: HTCDaskSettings | None = None, trying: Callable[[str], None] | None = None) -> Iterator[Finding]:
    """Try all links, with a test cluster of two workers, which is removed again whatever happens.

    Args:
        settings: of prefect_htcdask; read as a flow would read them by default.
        trying: is told the name of each link before it is tried.

    Yields:
        what was found of each link, in order.
    """
    with Checks(settings) as chain:
        yield from run_checks(chain.links(), trying or (lambda name: None))
