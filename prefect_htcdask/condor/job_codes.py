"""The numbers by which a job ad says where a job stands and why it is held, and the states that this package tells of.

Source: HTCondor manual, "Job ClassAd Attributes": JobStatus, HoldReasonCode.
"""

from __future__ import annotations

import enum


class JobStatus(enum.IntEnum):
    """JobStatus of a job ad."""

    IDLE = 1
    RUNNING = 2
    REMOVED = 3
    COMPLETED = 4
    HELD = 5
    TRANSFERRING_OUTPUT = 6
    SUSPENDED = 7


class HoldCode(enum.IntEnum):
    """HoldReasonCode of a job ad."""

    USER_REQUEST = 1
    JOB_POLICY = 3
    JOB_POLICY_UNDEFINED = 5
    FAILED_TO_CREATE_PROCESS = 6
    UNABLE_TO_OPEN_OUTPUT = 7
    UNABLE_TO_OPEN_INPUT = 8
    TRANSFER_OUTPUT_ERROR = 12
    TRANSFER_INPUT_ERROR = 13
    IWD_ERROR = 14
    SPOOLING_INPUT = 16
    HOOK_PREPARE_JOB_FAILURE = 19
    STARTD_HELD_JOB = 21
    UNABLE_TO_INIT_USER_LOG = 22
    SYSTEM_POLICY = 26
    SYSTEM_POLICY_UNDEFINED = 27
    MAX_TRANSFER_INPUT_SIZE_EXCEEDED = 32
    MAX_TRANSFER_OUTPUT_SIZE_EXCEEDED = 33
    JOB_OUT_OF_RESOURCES = 34
    INVALID_DOCKER_IMAGE = 35
    FAILED_TO_RUN_CONTAINER_TEST = 45
    JOB_DURATION_EXCEEDED = 46
    JOB_EXECUTE_EXCEEDED = 47
    HOOK_SHADOW_PREPARE_JOB_FAILURE = 48


class JobState(str, enum.Enum):
    """Where a job stands. Everything but the last two is in the queue.

    Only the queue tells of a job that is suspended; by the job event log, it runs.
    """

    IDLE = "idle"
    RUNNING = "running"
    SUSPENDED = "suspended"
    HELD = "held"
    REMOVED = "removed"
    EXITED = "exited"


def state_of(status: int, hold_code: int = 0) -> JobState:
    """The state that a job ad tells of.

    A job that is held for its input to be spooled, which the schedd lets go by itself, is idle. One that transfers its
    output still runs.

    Args:
        status: its JobStatus.
        hold_code: its HoldReasonCode.

    Raises:
        ValueError: HTCondor knows no such status.
    """
    if status == JobStatus.HELD:
        return JobState.IDLE if hold_code == HoldCode.SPOOLING_INPUT else JobState.HELD
    return _STATES[JobStatus(status)]


_STATES = {
    JobStatus.IDLE: JobState.IDLE,
    JobStatus.RUNNING: JobState.RUNNING,
    JobStatus.REMOVED: JobState.REMOVED,
    JobStatus.COMPLETED: JobState.EXITED,
    JobStatus.TRANSFERRING_OUTPUT: JobState.RUNNING,
    JobStatus.SUSPENDED: JobState.SUSPENDED,
}
