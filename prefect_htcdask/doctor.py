"""The doctor: every link of the chain from the settings to a worker's way to the Prefect API, tried for real."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from prefect.settings import get_current_settings

from prefect_htcdask.gateway import HTCGatewayCluster
from prefect_htcdask.preflight import check_versions
from prefect_htcdask.resolution import Parts, resolve_parts
from prefect_htcdask.settings import HTCDaskSettings
from prefect_htcdask.supervisor import oneshot
from prefect_htcdask.worker_jobs import worker_jobs

_GONE_TIMEOUT = 30.0


@dataclass(frozen=True)
class Finding:
    """One link of the chain: whether it holds, how long it took in seconds, and what was seen."""

    name: str
    ok: bool
    seconds: float
    detail: str


class _Broken(Exception):
    """A link does not hold, for a reason that no library tells."""


def examine(settings: HTCDaskSettings) -> Iterator[Finding]:
    """Try the links one by one; the first that breaks ends it, since the later ones hang on it.

    A test cluster with one worker is made, and removed again whatever happens.
    """
    found: dict[str, Any] = {}

    def parts() -> str:
        found["parts"] = resolve_parts(settings)
        return f"gateway {found['parts'].address}{' (embedded)' if found['parts'].embedded else ''}"

    def schedd() -> str:
        return f"jobs are taken from {oneshot.call(found['parts'].schedd, 'user')}"

    def cluster() -> str:
        found["cluster"] = HTCGatewayCluster(
            settings=settings, parts=found["parts"], on_message=lambda message: _note(found, message)
        )
        return f"cluster {found['cluster'].name}, scheduler reached through {found['cluster'].gateway.proxy_address}"

    def worker() -> str:
        found["cluster"].scale(1)
        found["client"] = found["cluster"].get_client(set_as_default=False)
        deadline = time.monotonic() + (settings.worker.start_timeout or 600)
        while not found["client"].nthreads():
            if "failed" in found:
                raise _Broken(found["failed"])
            if time.monotonic() > deadline:
                raise _Broken(f"no worker joined within worker.start_timeout = {settings.worker.start_timeout:.0f} s")
            time.sleep(0.2)
        return f"HTCondor job {', '.join(job.job_id for job in _jobs(found))} joined"

    def versions() -> str:
        check_versions(found["client"])
        return "Python, dask, distributed and Prefect are the same on scheduler, worker and here"

    def api() -> str:
        url = get_current_settings().api.url
        if not url:
            return "PREFECT_API_URL is not set: a temporary server is used, on this host only"
        answer = found["client"].submit(_reach, f"{url}/health", pure=False).result(timeout=30)
        if answer is not None:
            raise _Broken(f"the worker cannot reach PREFECT_API_URL = {url}: {answer}")
        return f"{url} answers the worker"

    def removal() -> str:
        found["client"].close()
        found["cluster"].close()
        deadline = time.monotonic() + _GONE_TIMEOUT
        while _jobs(found):
            if time.monotonic() > deadline:
                raise _Broken("the test worker's job is still in the queue: condor_q tells its state")
            time.sleep(0.2)
        return "worker job and cluster are gone"

    links: list[tuple[str, Callable[[], str]]] = [
        ("settings, gateway and pool found", parts),
        ("schedd lets us submit", schedd),
        ("gateway starts a scheduler", cluster),
        ("worker job starts and joins", worker),
        ("versions are the same", versions),
        ("Prefect API reachable from the worker", api),
        ("removal", removal),
    ]
    try:
        for name, link in links:
            started = time.monotonic()
            try:
                detail, ok = link(), True
            except Exception as exc:  # whatever breaks a link is the finding
                detail, ok = str(exc) or type(exc).__name__, False
            yield Finding(name, ok, time.monotonic() - started, detail)
            if not ok:
                return
    finally:
        if "cluster" in found:
            found["cluster"].close()


def _note(found: dict[str, Any], message: dict[str, Any]) -> None:
    if message["kind"] == "failed":
        found["failed"] = message["text"]


def _jobs(found: dict[str, Any]) -> list[Any]:
    parts: Parts = found["parts"]
    return [job for job in worker_jobs(parts) if job.cluster == found["cluster"].name]


def _reach(url: str) -> str | None:
    """Runs on the worker: `None` where `url` answers, else why not."""
    try:
        with urllib.request.urlopen(url, timeout=15):
            return None
    except OSError as exc:
        return str(exc)
