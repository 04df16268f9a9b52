"""The artifacts of a flow run: dashboard, progress, HTCondor jobs, and a report at the end.

They are made and updated by a thread of their own, one call to the Prefect API in `report.interval` at most, whatever
the number of jobs: of what changes faster the latest is shown. The flow waits for none of it but, as it ends, a few
seconds for the last.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from slugify import slugify

from prefect_htcdask.runner.ui import artifact_contents as contents
from prefect_htcdask.runner.ui.artifact_contents import Content
from prefect_htcdask.supervisor.report.markdown import markdown
from prefect_htcdask.supervisor.report.plot import why_none
from prefect_htcdask.utils.prefect_client import TIMEOUT, open_client

PATIENCE = 5.0
"""Seconds that the end of a flow run waits for its last artifacts at most; where the last call failed, it does not."""

HARDLY = 0.5

DASHBOARD, PROGRESS, JOBS, REPORT = "dask-dashboard", "task-progress", "htcondor-jobs", "htcondor-report"


def artifact_key(flow_name: str, name: str) -> str:
    """The key of an artifact: the same for all runs of a flow.

    So Prefect's page of artifacts has one entry for each kind and flow, whose versions are the flow's runs; with a key
    for each run, a flow that is scheduled would fill that page.
    """
    return f"{slugify(flow_name) or 'flow'}-{name}"


def start_artifacts(
    cluster: Any | None, dashboard: str | None, context: contextvars.Context, log: Callable[[str, str], None]
) -> Artifacts | None:
    """The artifacts of a flow run that has a cluster of its own; `None` where it has none, or nobody wants them.

    Args:
        cluster: the `HTCGatewayCluster`.
        dashboard: address of the Dask dashboard, if it has any.
        context: the flow run's context, with the settings of its API.
        log: logs to the flow run.
    """
    if cluster is None:
        return None
    settings, flow_run = cluster.settings.report, cluster.flow_run
    if not settings.enabled or flow_run is None:
        return None
    describe = partial(
        markdown,
        directory=str(cluster.run_directory),
        title=f"{flow_run.flow_name} / {flow_run.name}",
        picture=why_none(settings.picture),
    )
    return Artifacts(UUID(flow_run.id), flow_run.flow_name, dashboard, settings.interval, describe, context, log)


class Artifacts:
    """The artifacts of one flow run.

    Args:
        flow_run_id: the flow run.
        flow_name: its flow's name, from which the artifacts' keys are made.
        dashboard: address of the Dask dashboard, if it has any.
        interval: seconds between two calls to the API at least, while the flow run goes on.
        describe: makes the report of the supervisor's summary.
        context: the flow run's context, with the settings of its API.
        log: logs to the flow run.
        timeout: seconds that the API may take for an answer.
    """

    def __init__(
        self,
        flow_run_id: UUID,
        flow_name: str,
        dashboard: str | None,
        interval: float,
        describe: Callable[[Mapping[str, Any]], str],
        context: contextvars.Context,
        log: Callable[[str, str], None],
        timeout: float = TIMEOUT,
    ) -> None:
        self.timeout = timeout
        self._flow_run_id = flow_run_id
        self._flow_name = flow_name
        self._interval = interval
        self._describe = describe
        self._log = log
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._ending = threading.Event()
        self._wanted: dict[str, Content] = {}
        self._shown: dict[str, Content] = {}
        self._ids: dict[str, UUID] = {}
        self._turns: list[str] = []
        self._failing = self._complained = self._closed = False
        if dashboard:
            self._want({DASHBOARD: contents.dashboard_link(dashboard)})
        # A thread has no context of its own, and the API's address is in that.
        self._thread = threading.Thread(
            target=context.copy().run, args=(self._work,), name="htcdask-artifacts", daemon=True
        )
        self._thread.start()

    def take(self, message: Mapping[str, Any]) -> None:
        """Show what the supervisor tells, when it is time to."""
        self._want({PROGRESS: contents.progress(message), JOBS: contents.jobs(message)})

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Have the last state and the report shown, without waiting for it.

        Args:
            summary: the last that the supervisor told; empty where it was lost.
        """
        last: dict[str, Content | None] = {}
        reconciler = summary.get("report")
        if reconciler is not None:
            try:
                last[REPORT] = contents.report(self._describe(summary))
                last[JOBS] = contents.jobs(reconciler)
                last[PROGRESS] = contents.progress(reconciler, over=True)
            except Exception as exc:  # no report is worth a flow
                self._complain(exc)
        if DASHBOARD in self._wanted:
            last[DASHBOARD] = contents.dashboard_over()
        self._want(last)
        # In this order: the thread ends where nothing is left to be shown.
        self._ending.set()
        self._wake.set()

    def close(self, timeout: float = PATIENCE) -> None:
        """Wait until all is shown, `timeout` seconds at most; hardly where the API does not answer."""
        self._ending.set()
        self._wake.set()
        self._thread.join(min(timeout, HARDLY) if self._failing else timeout)
        # Should it go on, it says nothing beside the interpreter's end, and nothing new begins.
        self._closed = True

    def _want(self, wanted: Mapping[str, Content | None]) -> None:
        with self._lock:
            self._wanted.update({name: content for name, content in wanted.items() if content is not None})
        self._wake.set()

    # In the thread

    def _work(self) -> None:
        more = True
        while more and not self._closed:
            ending = self._ending.is_set()
            try:
                with open_client(self.timeout) as client:
                    while more := not self._closed and self._show_one(client):
                        self._ending.wait(self._interval)
            except Exception as exc:
                self._failing = True
                self._complain(exc)
                more = not ending
                self._ending.wait(self._interval)

    def _show_one(self, client: SyncPrefectClient) -> bool:
        """Show what changed, one artifact of it; returns whether there may be more to come."""
        while True:
            ending = self._ending.is_set()
            self._wake.clear()
            with self._lock:
                due = {name: content for name, content in self._wanted.items() if self._shown.get(name) != content}
            if due:
                break
            if ending:
                return False
            self._wake.wait()
        # Each in its turn; at the end, should time be short, the report first.
        name = (
            REPORT if REPORT in due else min(due, key=lambda one: self._turns.index(one) if one in self._turns else -1)
        )
        self._turns = [one for one in self._turns if one != name] + [name]
        self._show(client, name, due[name])
        self._failing = False
        self._shown[name] = due[name]
        return True

    def _show(self, client: SyncPrefectClient, name: str, content: Content) -> None:
        if name not in self._ids:
            key = artifact_key(self._flow_name, name)
            new = ArtifactCreate(key=key, flow_run_id=self._flow_run_id, **content._asdict())
            self._ids[name] = client.create_artifact(new).id
            return
        update = ArtifactUpdate(data=content.data, description=content.description)
        # `update_artifact` would send an event each time too, with all that the artifact says.
        client.request(
            "PATCH",
            "/artifacts/{id}",
            path_params={"id": self._ids[name]},
            json=update.model_dump(mode="json", exclude_unset=True),
        )

    def _complain(self, exc: Exception) -> None:
        if not self._complained and not self._closed:
            self._complained = True
            self._log("warning", f"The flow run's artifacts could not be written, and are tried again: {exc}")
