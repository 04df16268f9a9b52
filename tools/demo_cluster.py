"""The cluster class of the demo: it remembers its clusters, so that the demo can say where the flow ran.

In a module of its own, since the task runner travels to the workers with its class's name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from prefect_htcdask import HTCGatewayCluster

if TYPE_CHECKING:
    from prefect_htcdask.condor.job_events import JobRecord


class DemoCluster(HTCGatewayCluster):
    """A cluster that is kept in `made`."""

    made: ClassVar[list[DemoCluster]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.made.append(self)

    def jobs_that_ran(self) -> list[JobRecord]:
        """The worker jobs that were given a slot, from HTCondor's log of their events."""
        from prefect_htcdask.condor.job_events import EventLogReader, JobTable
        from prefect_htcdask.condor.staging import RunDirectory

        table = JobTable()
        reader = EventLogReader(RunDirectory(self.run_directory).event_log)
        try:
            reader.read(table)
        finally:
            reader.close()
        return [record for record in table.records.values() if record.host]
