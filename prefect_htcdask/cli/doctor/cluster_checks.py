"""The links that the doctor tries, and what they hand to one another."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from dask.utils import format_bytes
from prefect.settings import get_current_settings

from prefect_htcdask.cleanup.jobs import WorkerJob, worker_jobs
from prefect_htcdask.cli.doctor.checks import Check, CheckFailed, CheckSkipped
from prefect_htcdask.cli.doctor.worker_tasks import digest, reach, read
from prefect_htcdask.condor.submit_description import cluster_digest
from prefect_htcdask.gateway.checks import ask_for_options
from prefect_htcdask.gateway.client import HTCGatewayCluster
from prefect_htcdask.gateway.endpoints import Endpoints, resolve_endpoints
from prefect_htcdask.gateway.finalizers import PrivateGateway
from prefect_htcdask.runner.preflight import check_versions
from prefect_htcdask.settings import HTCDaskSettings, load_settings
from prefect_htcdask.settings.sources import stated_settings
from prefect_htcdask.supervisor import oneshot

TEST_LEASE = 60.0
"""Seconds that the test workers live without a renewal at most, so that one is seen soon: each third of it."""

# Seconds, on however busy a machine; each ends as soon as what it waits for is there.
_GONE_TIMEOUT = 120.0
_SECOND_WORKER_TIMEOUT = 60.0
_TASK_TIMEOUT = 120.0
_CONNECT_TIMEOUT = 30.0
_MOVED = 4 * 1024**2  # bytes, from worker to worker
T = TypeVar("T")


class Checks:
    """What the links found so far. As a context, it closes the test cluster.

    Args:
        settings: of prefect_htcdask; `None`: to be read.
    """

    def __init__(self, settings: HTCDaskSettings | None) -> None:
        self._given = settings
        self._settings: HTCDaskSettings | None = None
        self._parts: Endpoints | None = None
        self._cluster: HTCGatewayCluster | None = None
        self._client: Any = None
        self._proxy = ("", 0)
        self._leases: dict[str, float] = {}
        self._failure = ""

    def __enter__(self) -> Checks:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._client is not None:
            with suppress(Exception):
                self._client.close()
        if self._cluster is not None:
            self._cluster.close()

    def links(self) -> list[Check]:
        """The links, in the order in which they are tried."""
        found, workers = ("gateway and pool found",), ("worker jobs start and join",)
        cluster = ("gateway starts a scheduler",)
        return [
            Check("settings", self.read_settings, "correct the setting that is named"),
            Check(
                *found,
                self.find_parts,
                "set gateway.address and condor.config_file, or let embedded.enabled be true",
                ("settings",),
            ),
            Check(
                "gateway answers and lets us in",
                self.ask_gateway,
                "check that the gateway runs, gateway.address, and gateway.username with gateway.password, or "
                "gateway.token, or the block that gateway.credentials_block names",
                found,
            ),
            Check(
                "gateway's proxy takes connections",
                self.reach_proxy,
                "check gateway.proxy_address (host:port of the proxy's TLS connections), that the proxy runs, and that "
                "no firewall is between",
                ("gateway answers and lets us in",),
            ),
            Check(
                "schedd takes our jobs",
                self.ask_schedd,
                "check that HTCondor runs there, condor.schedd, condor.collector and condor.config_file, and "
                "condor.token_file or condor.credentials_block",
                found,
            ),
            Check(
                *cluster,
                self.start_cluster,
                "see the gateway's own log for why the scheduler does not start, and the supervisor's log in "
                "condor.directory",
                ("gateway's proxy takes connections", "schedd takes our jobs"),
            ),
            Check(
                "scheduler reached through the proxy",
                self.reach_scheduler,
                "let the TLS connection through as it is: what stands before the proxy may not end it, nor drop the "
                "server's name (SNI)",
                cluster,
            ),
            Check(
                *workers,
                self.start_workers,
                "prefect-htcdask jobs tells why jobs wait; lower worker.memory, worker.cpus or worker.disk, or correct "
                "worker.python, worker.image or worker.requirements",
                cluster,
            ),
            Check(
                "versions are the same",
                self.compare_versions,
                "give flow, scheduler and workers one environment or image (worker.image, worker.container_image, "
                "worker.python)",
                workers,
            ),
            Check("Prefect API reachable from the worker", self.reach_api, "check PREFECT_API_URL", workers),
            Check(
                "data goes from worker to worker",
                self.move_data,
                "open the ports between the pool's hosts to one another: Dask's workers listen on ports that the "
                "system gives",
                workers,
            ),
            Check(
                "results are stored where workers share them",
                self.share_results,
                "set PREFECT_DEFAULT_RESULT_STORAGE_BLOCK to remote storage, or PREFECT_RESULTS_LOCAL_STORAGE_PATH to "
                "a path that the pool's hosts share",
                workers,
            ),
            Check(
                "lease is renewed",
                self.see_renewal,
                "see the supervisor's log in condor.directory: the schedd may not let us edit our jobs (ALLOW_WRITE)",
                workers,
            ),
            Check(
                "removal",
                self.remove,
                "condor_q tells the state of jobs that stay; condor_rm -forcex forgets those that cannot be reached",
                cluster,
            ),
        ]

    def read_settings(self) -> str:
        settings = self._given or load_settings()
        stated = [f"{name} = {value} ({source})" for name, value, source in stated_settings(settings)]
        lease = settings.lease.model_copy(update={"duration": min(TEST_LEASE, settings.lease.duration)})
        adaptive = settings.adaptive.model_copy(update={"interval": min(1.0, settings.adaptive.interval)})
        self._settings = settings.model_copy(update={"lease": lease, "adaptive": adaptive})
        return f"{'; '.join(stated)}; all others are defaults" if stated else "all are defaults"

    @property
    def settings(self) -> HTCDaskSettings:
        return _there(self._settings)

    @property
    def parts(self) -> Endpoints:
        return _there(self._parts)

    @property
    def cluster(self) -> HTCGatewayCluster:
        return _there(self._cluster)

    def find_parts(self) -> str:
        self._parts = resolve_endpoints(self.settings)
        return f"gateway {self.parts.address}{' (embedded)' if self.parts.embedded else ''}"

    def ask_gateway(self) -> str:
        async def ask() -> str:
            async with PrivateGateway(**self.parts.gateway_arguments, asynchronous=True) as gateway:
                await ask_for_options(gateway)
                return str(gateway.proxy_address)

        host, _, port = asyncio.run(ask()).rpartition("://")[2].rpartition(":")
        self._proxy = (host.strip("[]"), int(port))
        return f"{self.parts.address} accepts our login"

    def reach_proxy(self) -> str:
        try:
            with socket.create_connection(self._proxy, _CONNECT_TIMEOUT):
                return f"{_address(self._proxy)} accepts a connection"
        except OSError as exc:
            raise CheckFailed(f"{_address(self._proxy)}: {exc}") from exc

    def ask_schedd(self) -> str:
        return f"jobs are taken from {oneshot.call(self.parts.schedd, 'user')}"

    def start_cluster(self) -> str:
        self._cluster = HTCGatewayCluster(settings=self.settings, parts=self.parts, on_message=self._take_message)
        # Asked for now: the jobs start while the next links are tried.
        self._cluster.scale(2)
        return f"cluster {self._cluster.name}"

    def _take_message(self, message: dict[str, Any]) -> None:
        if message["kind"] == "failed":
            self._failure = message["text"]

    def reach_scheduler(self) -> str:
        name = f"daskgateway-{self.cluster.name}"
        context = self.cluster.security.get_connection_args("client")["ssl_context"]
        try:
            with (
                socket.create_connection(self._proxy, _CONNECT_TIMEOUT) as raw,
                context.wrap_socket(raw, server_hostname=name) as connection,
            ):
                return f"{connection.version()} with {name} at {_address(self._proxy)}"
        except (OSError, ssl.SSLError) as exc:
            raise CheckFailed(f"{_address(self._proxy)} as {name}: {exc}") from exc

    def start_workers(self) -> str:
        self._client = self.cluster.get_client(set_as_default=False)
        timeout = next(iter(self.settings.groups.values())).start_timeout or 600
        self._await(self._workers, timeout, f"no worker joined within worker.start_timeout = {timeout:.0f} s")
        jobs = self._jobs()
        self._leases = {job.job_id: job.lease_expires for job in jobs}
        return f"HTCondor jobs {', '.join(job.job_id for job in jobs)}; workers that joined: {len(self._workers())}"

    def compare_versions(self) -> str:
        check_versions(self._client)
        return "Python, dask, distributed and Prefect are the same on scheduler, worker and here"

    def reach_api(self) -> str:
        api = get_current_settings().api
        url = api.url
        if not url:
            return "PREFECT_API_URL is not set: a temporary server is used, on this host only"
        # As Prefect's client does; where the setting is not stated, by each host's own default.
        certificates = api.ssl_cert_file if "ssl_cert_file" in api.model_fields_set else None
        question = f"{url}/health", certificates or None, not api.tls_insecure_skip_verify
        answer = self._client.submit(reach, *question, pure=False).result(timeout=_TASK_TIMEOUT)
        if answer is None:
            return f"{url} answers the worker"
        here = reach(*question)
        raise CheckFailed(
            f"the worker cannot reach PREFECT_API_URL = {url}: {answer}",
            "it answers here: set PREFECT_API_URL to an address that the pool's hosts can reach, such as "
            "http://THIS_HOST:4200/api with a server started by prefect server start --host 0.0.0.0"
            if here is None
            else f"it does not answer here either ({here}): start the Prefect server, or correct PREFECT_API_URL",
        )

    def move_data(self) -> str:
        try:
            self._await(lambda: len(self._workers()) > 1, _SECOND_WORKER_TIMEOUT, "")
        except CheckFailed as exc:
            raise CheckSkipped(
                f"only one worker started within {_SECOND_WORKER_TIMEOUT:.0f} s",
                "try again where the pool has room for two workers",
            ) from exc
        giver, taker = self._workers()[:2]
        submit = self._client.submit
        data = submit(os.urandom, _MOVED, workers=[giver], allow_other_workers=False, pure=False)
        digests = [
            submit(digest, data, workers=[worker], allow_other_workers=False, pure=False) for worker in (giver, taker)
        ]
        moved = f"{format_bytes(_MOVED)} from {giver} to {taker}"
        try:
            there, here = (one.result(timeout=_TASK_TIMEOUT) for one in digests)
        except (TimeoutError, asyncio.TimeoutError) as exc:
            raise CheckFailed(f"{moved}: not within {_TASK_TIMEOUT:.0f} s") from exc
        if there != here:
            raise CheckFailed(f"{moved}: what arrived is something else")
        return moved

    def share_results(self) -> str:
        results = get_current_settings().results
        if results.default_storage_block:
            return f"they go to the block {results.default_storage_block}"
        path = Path(results.local_storage_path).expanduser()
        word, made = secrets.token_hex(), not path.is_dir()
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".htcdask-doctor-{secrets.token_hex(8)}"
        try:
            probe.write_text(word)
            seen = self._client.submit(read, str(probe), pure=False).result(timeout=_TASK_TIMEOUT)
        finally:
            probe.unlink(missing_ok=True)
            if made:
                with suppress(OSError):  # not empty: a result came there meanwhile
                    path.rmdir()
        if seen == word:
            return f"the worker reads what is written here to {path}"
        if results.persist_by_default:
            raise CheckFailed(f"the worker does not see what is written here to {path}: {seen}")
        return (
            f"the worker does not see what is written here to {path}; that matters only where results are persisted, "
            "which PREFECT_RESULTS_PERSIST_BY_DEFAULT does not ask for"
        )

    def see_renewal(self) -> str:
        def renewed() -> list[tuple[str, float]]:
            moves = [
                (job.job_id, job.lease_expires - self._leases.get(job.job_id, job.lease_expires))
                for job in self._jobs()
            ]
            return [(job, move) for job, move in moves if move > 0]

        lease = self.settings.lease.duration
        job, move = self._await(renewed, lease, f"HTCDaskLeaseExpires did not move on within {lease:.0f} s", pause=1.0)[
            0
        ]
        return f"HTCDaskLeaseExpires of job {job} moved on by {move:.0f} s"

    def remove(self) -> str:
        if self._client is not None:
            self._client.close()
        self.cluster.close()
        self._await(lambda: not self._jobs(), _GONE_TIMEOUT, "a test worker's job is still in the queue")
        return "worker jobs and cluster are gone"

    def _workers(self) -> list[str]:
        return list(self._client.nthreads())

    def _jobs(self) -> list[WorkerJob]:
        return [job for job in worker_jobs(self.parts) if job.cluster == cluster_digest(self.cluster.name)]

    def _await(self, condition: Callable[[], T], timeout: float, complaint: str, pause: float = 0.2) -> T:
        """Wait until `condition()` is true, and return what it gave.

        Raises:
            Broken: it is not, after `timeout` seconds, or the supervisor gave up.
        """
        deadline = time.monotonic() + timeout
        while not (value := condition()):
            if self._failure:
                raise CheckFailed(self._failure)
            if time.monotonic() > deadline:
                raise CheckFailed(complaint)
            time.sleep(pause)
        return value


def _there(thing: T | None) -> T:
    assert thing is not None, "a link is tried only after those that it needs"
    return thing


def _address(host_port: tuple[str, int]) -> str:
    return f"{host_port[0]}:{host_port[1]}"
