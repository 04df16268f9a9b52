"""Which flow run each of this user's clusters was started for, and whether the process that has it may live."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prefect_htcdask.cleanup.jobs import WorkerJob
from prefect_htcdask.condor.submit_description import (
    API_ATTRIBUTE,
    CLUSTER_ATTRIBUTE,
    FLOW_RUN_ATTRIBUTE,
    cluster_constraint,
)
from prefect_htcdask.gateway.endpoints import Endpoints
from prefect_htcdask.gateway.run_directory import ClusterRecord, ClusterTrace
from prefect_htcdask.supervisor import oneshot
from prefect_htcdask.utils.api_identity import api_identity

_MOST_CLUSTERS = 100
_MOST_ADS = 10_000


def owners_by_history(parts: Endpoints, clusters: Iterable[str], since: float) -> list[ClusterRecord]:
    """The flow runs of clusters that no run directory tells of, by the jobs that they once had.

    Args:
        parts: gateway and schedd.
        clusters: digests of clusters' names; a hundred of them are asked for.
        since: Unix time in seconds; jobs that left the queue earlier are not looked at.

    Raises:
        SupervisorError: the schedd could not be asked.
    """
    wanted = list(clusters)[:_MOST_CLUSTERS]
    if not wanted:
        return []
    condition = (
        f"{FLOW_RUN_ATTRIBUTE} =!= undefined && EnteredCurrentStatus > {int(since)} "
        f"&& ({' || '.join(cluster_constraint(digest) for digest in wanted)})"
    )
    projection = [CLUSTER_ATTRIBUTE, FLOW_RUN_ATTRIBUTE, API_ATTRIBUTE, "HTCDaskAttempt", "JobBatchName"]
    ads = oneshot.call(parts.schedd, "history", condition, projection, _MOST_ADS)
    return list({str(ad[CLUSTER_ATTRIBUTE]): _of_ad(ad) for ad in ads}.values())


def _of_ad(ad: Mapping[str, Any]) -> ClusterRecord:
    return ClusterRecord(
        cluster=str(ad[CLUSTER_ATTRIBUTE]),
        flow_run_id=str(ad[FLOW_RUN_ATTRIBUTE]),
        flow_run_name=str(ad.get("JobBatchName") or ""),
        attempt=int(ad.get("HTCDaskAttempt") or 1),
        api_url=str(ad.get(API_ATTRIBUTE) or ""),
        lease=0.0,
        host="",
        pid=0,
        started=0.0,
    )


def api_of(record: ClusterRecord) -> str:
    """The Prefect API that knows a record's flow run; older versions wrote its address as it was set."""
    return api_identity(record.api_url, record.host.partition(" ")[0])


class Liveness:
    """What tells whether the process of a flow run lives.

    Args:
        jobs: worker jobs in the queue.
        records: whose the clusters are.
        traces: run directories, by cluster.
        lease: seconds that a cluster lives without a renewal, where its record does not say.
        now: Unix time in seconds.
    """

    def __init__(
        self,
        jobs: Iterable[WorkerJob],
        records: Iterable[ClusterRecord],
        traces: Mapping[str, ClusterTrace],
        lease: float,
        now: float,
    ) -> None:
        self._now = now
        self._leased_until: dict[str, float] = {}
        self._records: dict[str, list[ClusterRecord]] = {}
        self._apis: dict[str, set[str]] = {}
        for job in jobs:
            self._extend(job.flow_run_id, job.lease_expires)
            self._belongs(job.flow_run_id, job.api)
        for record in records:
            self._records.setdefault(record.flow_run_id, []).append(record)
            self._belongs(record.flow_run_id, api_of(record))
            trace = traces.get(record.cluster)
            if trace is not None:
                self._extend(record.flow_run_id, trace.last_sign + (record.lease or lease))

    def _extend(self, flow_run_id: str, until: float) -> None:
        self._leased_until[flow_run_id] = max(until, self._leased_until.get(flow_run_id, 0.0))

    def _belongs(self, flow_run_id: str, api: str) -> None:
        if api:
            self._apis.setdefault(flow_run_id, set()).add(api)

    def process_is_dead(self, flow_run_id: str, attempt: int | None = None) -> bool:
        """Whether the process of a flow run is known to be gone, since it ran on this host.

        Args:
            flow_run_id: the flow run.
            attempt: the attempt that it was; the last one that has a record by default.
        """
        records = self._records.get(flow_run_id, [])
        last = attempt or max((record.attempt for record in records), default=0)
        answers = [record.process_lives() for record in records if record.attempt == last]
        return bool(answers) and all(answer is False for answer in answers)

    def process_is_alive(self, flow_run_id: str) -> bool:
        """Whether a process that had the flow run is known to live, on this host."""
        return any(record.process_lives() for record in self._records.get(flow_run_id, []))

    def lease_valid(self, flow_run_id: str) -> bool:
        """Whether somebody may look after the flow run's cluster: its lease has not run out."""
        leased = self._leased_until.get(flow_run_id, 0.0) > self._now
        return leased and not self.process_is_dead(flow_run_id)

    def other_api(self, flow_run_id: str, ours: str) -> str:
        """The Prefect API that knows the flow run, where that is known to be another one than `ours`; else empty."""
        apis = self._apis.get(flow_run_id, set())
        return "" if ours in apis else " and ".join(sorted(apis))

    def belongs_to(self, flow_run_id: str, api: str) -> bool:
        """Whether a job or a record says that an API knows the flow run."""
        return api in self._apis.get(flow_run_id, set())
