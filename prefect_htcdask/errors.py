"""Errors that the flow's side raises. `settings.SettingsError` tells of a wrong setting."""

from __future__ import annotations


class HTCDaskError(RuntimeError):
    """The cluster of a flow run cannot do its work: the message says why and what to do."""


class VersionMismatchError(HTCDaskError):
    """Scheduler, workers and the flow's process run versions that do not work together."""


class TaskRunLost(HTCDaskError):
    """A task run ended without a state of its own: its worker, the scheduler or the connection was lost."""


class UnpicklableResultError(HTCDaskError):
    """The result of a task run cannot be pickled on its worker, or cannot be unpickled where it is needed."""


class RemoteTaskError(HTCDaskError):
    """Stands for the exception of a task run whose class cannot be imported, or not be made again, in this process.

    Args:
        type_name: the class of that exception.
        message: what it said.
        reason: why it is not here itself.
    """

    def __init__(self, type_name: str, message: str, reason: str) -> None:
        super().__init__(type_name, message, reason)
        self.type_name = type_name
        self.message = message
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.type_name}: {self.message} (the exception itself cannot be had in this process: {self.reason})"


class WorkerGroupError(HTCDaskError):
    """It cannot be said which worker group a task belongs to."""


class UnknownWorkerGroupError(WorkerGroupError):
    """A task names a worker group that there is not, or asks for resources that no group offers."""
