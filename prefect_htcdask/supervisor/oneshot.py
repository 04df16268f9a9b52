"""One question to a schedd, in a process of its own: the bindings hold the GIL, and the flow's process must not wait.

``call`` is the flow's side; ``python -m prefect_htcdask.supervisor.oneshot`` is the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from prefect_htcdask.condor.address import ScheddAddress
from prefect_htcdask.condor.submit_description import cluster_constraint, cluster_digest
from prefect_htcdask.supervisor.client import SupervisorError, clean_environment
from prefect_htcdask.supervisor.protocol import decode, encode

if TYPE_CHECKING:
    from prefect_htcdask.condor.schedd import ScheddClient

_TIMEOUT = 120.0
_OPERATIONS = ("remove", "query", "history", "user")
_EXPLAIN = "explain"


def call(schedd: ScheddAddress, operation: str, *arguments: Any, timeout: float = _TIMEOUT) -> Any:
    """Call a method of `condor.schedd.ScheddClient` in a process of its own, or ``explain`` idle jobs.

    Args:
        schedd: how to reach the schedd.
        operation: ``remove``, ``query``, ``history`` or ``user``; or ``explain``.
        arguments: the method's positional arguments; for ``explain`` a list of the arguments of
            `condor.analyze.IdleJobs.explain`, answered by a list of diagnoses as dictionaries, or `None`.
        timeout: seconds to wait at most.

    Raises:
        SupervisorError: the schedd could not be asked; the message names the setting and the remedy.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "prefect_htcdask.supervisor.oneshot"],
            input=encode((schedd, operation, arguments)),
            capture_output=True,
            timeout=timeout,
            env=clean_environment(os.environ),
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise SupervisorError(f"the schedd did not answer within {timeout:.0f} s") from exc
    try:
        answer = json.loads(done.stdout)
    except ValueError as exc:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no word on stderr"]
        raise SupervisorError(f"the schedd could not be asked: {last[0]}") from exc
    if "error" in answer:
        raise SupervisorError(answer["error"])
    return answer["result"]


def remove_jobs(schedd: ScheddAddress, cluster_name: str) -> int:
    """Remove our worker jobs of a gateway cluster; returns how many there were.

    Raises:
        SupervisorError: the schedd could not be asked.
    """
    reason = "prefect_htcdask: the gateway cluster was stopped"
    removed: int = call(schedd, "remove", cluster_constraint(cluster_digest(cluster_name)), reason)
    return removed


def _explain(client: ScheddClient, questions: Iterable[tuple[str, int, str]]) -> list[dict[str, str] | None]:
    """Why idle jobs wait, of several kinds; see `IdleJobs.explain`."""
    from prefect_htcdask.condor.analyze import IdleJobs

    idle_jobs = IdleJobs(client)
    found = [idle_jobs.explain(*question) for question in questions]
    return [asdict(diagnosis) if diagnosis is not None else None for diagnosis in found]


def main() -> int:
    """Answer the question on stdin. Returns the exit status."""
    from prefect_htcdask.condor.schedd import ScheddClient, ScheddError

    schedd, operation, arguments = decode(sys.stdin.buffer.readline())
    if operation not in (*_OPERATIONS, _EXPLAIN):
        raise ValueError(f"{operation!r} is no operation; there are {', '.join((*_OPERATIONS, _EXPLAIN))}")
    try:
        client = ScheddClient(schedd)
        try:
            function = _explain if operation == _EXPLAIN else getattr(type(client), operation)
            answer = {"result": function(client, *arguments)}
        finally:
            client.close()
    except ScheddError as exc:
        answer = {"error": str(exc)}
    json.dump(answer, sys.stdout, default=str)
    return 0


if __name__ == "__main__":
    sys.exit(main())
