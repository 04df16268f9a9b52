"""Errors that the flow's side raises. `settings.SettingsError` tells of a wrong setting."""

from __future__ import annotations


class HTCDaskError(RuntimeError):
    """The cluster of a flow run cannot do its work: the message says why and what to do."""


class VersionMismatchError(HTCDaskError):
    """Scheduler, workers and the flow's process run versions that do not work together."""


class TaskRunLost(HTCDaskError):
    """A task run ended without a state of its own: its worker, the scheduler or the connection was lost."""


class WorkerGroupError(HTCDaskError):
    """It cannot be said which worker group a task belongs to."""


class UnknownWorkerGroupError(WorkerGroupError):
    """A task names a worker group that there is not, or asks for resources that no group offers."""
