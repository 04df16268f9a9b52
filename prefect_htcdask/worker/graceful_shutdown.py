"""How a Dask worker leaves its cluster: drained towards the end of its lifetime, or soon when HTCondor wants the slot.

Either way the scheduler gives it no new task, what it has not begun goes back to the queue, its results move to other
workers, and it is removed as *expected*: a worker that just vanishes makes the scheduler mark every task that it was
assigned as suspicious, and a few such marks are a `KilledWorker` (distributed, `Scheduler.remove_worker`).

What differs is the task in hand. Draining lets it end, however long that takes: the lifetime is the user's own wish,
and a task longer than it would else be run again for ever. A SIGTERM is not ours to put off, so the task goes back and
runs again elsewhere.
"""

from __future__ import annotations

import asyncio
import math
import pickle
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from distributed import Status, Worker
from distributed.metrics import time as wall_time
from distributed.worker_state_machine import FreeKeysEvent

from prefect_htcdask.scheduler.plugin import DRAIN as DRAIN
from prefect_htcdask.scheduler.plugin import QUIET as QUIET
from prefect_htcdask.worker.dask_worker import ProfiledWorker

RESCHEDULED = "htcdask-handed-back"
"""Topic of the scheduler's events that tells of each task taken from a worker before it was done."""

WARN_AFTER = 3
"""Times that a task is handed back before the user is warned, and each time from then on."""

_ENDING = (Status.closing, Status.closed, Status.failed)
_POLL = 0.1  # seconds between two looks at the tasks in hand
_RETRY = 1.0  # seconds between two attempts to find a worker that takes the results
_AGREEMENT = 5.0  # seconds that the scheduler may take to hear of the last task's end
_CLOSE_TIMEOUT = 2.0
_CLOSING_TIME = 20.0  # seconds that a drained worker may take to close: Prefect's events are sent off meanwhile

# Shares of the vacate time at which a step of an eviction has to be over.
_FINISHING = 0.15
_MOVING = 0.5
_CLOSED = 0.8

Say = Callable[[str], None]


class HTCondorWorker(ProfiledWorker):
    """A Dask worker that does not wait for the threads of its tasks when it closes: its process ends anyway.

    Attributes:
        flow_run_id: the flow run that its job belongs to, if any.
    """

    flow_run_id: str | None = None

    async def close(  # type: ignore[override]
        self,
        timeout: float = _CLOSE_TIMEOUT,
        executor_wait: bool = False,
        nanny: bool = False,
        reason: str = "worker-close",
    ) -> str | None:
        """Close, within seconds and the time that preloads and plugins take; see `distributed.Worker.close`."""
        closed: str | None = await super().close(
            timeout=min(timeout, _CLOSE_TIMEOUT), executor_wait=False, nanny=False, reason=reason
        )
        return closed


def drains_after(lifetime: float, stagger: float, job_id: str) -> float:
    """When a worker begins to drain: a moment of its own before the end of its lifetime.

    The moments of jobs submitted together, or one after the other, are spread evenly rather than drawn by chance, by
    which several would often leave at once: multiples of an irrational number, modulo 1 (a Kronecker sequence).

    Args:
        lifetime: seconds from the start of the job until the worker should be gone.
        stagger: seconds before that in which workers begin to drain. The last quarter is left for draining.
        job_id: ``cluster.proc`` of the HTCondor job.

    Returns:
        seconds from the start of the job.
    """
    cluster, _, proc = job_id.partition(".")
    share = (int(cluster) * math.sqrt(2) + int(proc or 0) * (math.sqrt(5) - 1) / 2) % 1.0
    return max(0.0, lifetime - stagger * (0.25 + 0.75 * share))


def in_hand(worker: Worker) -> dict[str, float]:
    """The tasks that a worker is running, and for how many seconds."""
    now = wall_time()
    tasks = (*worker.state.executing, *worker.state.long_running)
    return {str(task.key): max(0.0, now - (task.start_time or now)) for task in tasks}


def hand_back_unstarted(worker: Worker) -> int:
    """Give the tasks that the worker has not begun back to the scheduler; returns how many.

    They are released here first: the scheduler takes a task back only where no further word of it can come
    (distributed, `Scheduler._reschedule`).
    """
    state = worker.state
    keys = [task.key for task in (*state.waiting, *state.ready, *state.constrained)]
    if keys:
        stimulus = f"htcdask-leave-{wall_time()}"
        worker.handle_stimulus(FreeKeysEvent(keys=keys, stimulus_id=stimulus))
        for key in keys:
            worker.batched_send({"op": "reschedule", "key": key, "stimulus_id": stimulus})
    return len(keys)


def take_no_more(worker: Worker) -> None:
    """Have the scheduler give the worker no new task; a retirement that came to nothing may have undone it."""
    if worker.status in (Status.running, Status.paused):
        worker.status = Status.closing_gracefully
    hand_back_unstarted(worker)


async def assigned(worker: Worker) -> list[Any] | None:
    """Keys that the scheduler believes the worker to have; `None` where it does not know the worker any more."""
    try:
        answer: dict[str, list[Any]] = await worker.scheduler.processing(workers=[worker.address])
    except KeyError:
        return None
    return answer[worker.address]


async def drain(worker: Worker, say: Say, until: float | None) -> None:
    """Finish the tasks in hand, move the results, deregister and close.

    Args:
        worker: the worker.
        say: writes a line for the submitting side to find.
        until: when the worker should be gone (`time.monotonic`); `None`: when it is done. A task in hand goes on all
            the same; results that nobody can take are given up then.
    """
    await _finish(worker, say, until)
    if until is not None:
        # A task that ended late has left no time to find a place for its result.
        until = max(until, time.monotonic() + _CLOSING_TIME)
    await move_results(worker, say, until)
    await _deregister(worker, say)
    await _close(worker, say, _CLOSING_TIME)


async def _finish(worker: Worker, say: Say, until: float | None) -> None:
    """Wait until the worker has no task in hand, and the scheduler knows it."""
    told = False
    agreement = math.inf
    while worker.status not in _ENDING:
        take_no_more(worker)
        now = time.monotonic()
        if running := in_hand(worker):
            agreement = math.inf
            if until is not None and now > until and not told:
                told = True
                say(f"past worker.lifetime, the worker leaves when it is done with {_described(running)}")
        else:
            agreement = min(agreement, now + _AGREEMENT)
            if not await assigned(worker) or now > agreement:
                return
        await asyncio.sleep(_POLL)


async def move_results(worker: Worker, say: Say, until: float | None) -> bool:
    """Move the results that only this worker holds to others, and have it removed from the scheduler.

    Where no other worker can take them (there is none, or all are leaving too), wait for one.

    Args:
        worker: the worker.
        say: writes a line for the submitting side to find.
        until: when to give up (`time.monotonic`); `None`: never.

    Returns:
        whether nothing was lost.
    """
    told = False
    while worker.status not in _ENDING:
        take_no_more(worker)
        retired = await asyncio.wait_for(
            worker.scheduler.retire_workers(
                workers=[worker.address], close_workers=False, remove=True, stimulus_id=f"htcdask-leave-{wall_time()}"
            ),
            timeout=None if until is None else max(_CLOSE_TIMEOUT, until - time.monotonic()),
        )
        if retired or await assigned(worker) is None:
            # The scheduler would answer the next heartbeat by having it close on the spot.
            worker.periodic_callbacks["heartbeat"].stop()
            return True
        if until is not None and time.monotonic() + _RETRY > until:
            say(f"no other worker could take the results held here ({len(worker.data)}): what is needed is run again")
            return False
        if not told:
            told = True
            say(f"no other worker can take the results held here ({len(worker.data)}): waiting for one")
        await asyncio.sleep(_RETRY)
    return True


async def leave(worker: Worker, say: Say, vacate_time: float) -> None:
    """Hand tasks and results back to the scheduler, then close, within the job's vacate time in seconds.

    A task that ends within the first moments is kept; the others in hand run again elsewhere.
    """
    started = time.monotonic()
    while worker.status not in _ENDING:
        take_no_more(worker)
        running = in_hand(worker)
        if not running or time.monotonic() > started + vacate_time * _FINISHING:
            break
        await asyncio.sleep(_POLL)
    try:
        await asyncio.wait_for(_tell_of(worker, say), timeout=_CLOSE_TIMEOUT)
        if not in_hand(worker):
            # The end of the last task travels on another connection than what follows.
            await asyncio.wait_for(_finish(worker, say, None), timeout=vacate_time * _FINISHING)
    except Exception as exc:  # not worth an end that is late
        say(f"the scheduler did not answer: {type(exc).__name__}: {exc}")
    try:
        until = started + vacate_time * _MOVING
        await asyncio.wait_for(move_results(worker, say, until), timeout=max(1.0, until - time.monotonic()))
    except Exception as exc:  # the scheduler may be gone, or busy: leaving goes on in any case
        say(f"retirement did not end in time: {type(exc).__name__}: {exc}")
    await _deregister(worker, say)
    await _close(worker, say, max(1.0, started + vacate_time * _CLOSED - time.monotonic()))


async def _deregister(worker: Worker, say: Say) -> None:
    """Take leave of the scheduler, if the retirement has not; tasks in hand go back to the queue."""
    if worker.status in _ENDING:
        return
    try:
        await asyncio.wait_for(
            worker.scheduler.unregister(
                address=worker.address, expected=True, close=False, stimulus_id="htcdask-leave"
            ),
            timeout=_CLOSE_TIMEOUT,
        )
    except Exception as exc:
        say(f"the scheduler did not take the worker's leave: {type(exc).__name__}: {exc}")


async def _close(worker: Worker, say: Say, timeout: float) -> None:
    """Close the worker, and with it what is preloaded: Prefect's events and logs are sent off then."""
    try:
        await asyncio.wait_for(worker.close(reason="htcdask-leave"), timeout=timeout)
    except Exception as exc:
        say(f"the worker did not close in time: {type(exc).__name__}: {exc}")


async def finished(worker: Worker) -> None:
    """Wait until the worker has closed by order of the scheduler, or has been closing for a while."""
    while worker.status not in _ENDING:
        await asyncio.sleep(0.2)
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(worker.finished(), timeout=_CLOSING_TIME)


async def _tell_of(worker: Worker, say: Say) -> None:
    """Report the tasks in hand as handed back, and warn the user of one that has been so several times.

    Such a task may be longer than the pool lets a job run, and would be run again for ever without a word.
    """
    running = in_hand(worker)
    if not running:
        return
    say(f"the worker was told to leave; handed back: {_described(running)}")
    earlier = await worker.scheduler.events(topic=RESCHEDULED)
    for key, seconds in running.items():
        times = 1 + sum(1 for _, event in earlier if event.get("key") == key)
        worker.log_event(RESCHEDULED, {"key": key, "seconds": seconds, "times": times, "worker": str(worker.name)})
        if times >= WARN_AFTER:
            # Dask's clients show events of this topic as warnings (distributed, `worker.warn`).
            worker.log_event("warn", {"message": pickle.dumps(warning(key, seconds, times))})


def warning(key: str, seconds: float, times: int) -> str:
    """What the user is told of a task that workers had to hand back several times."""
    return (
        f"task {key} was taken from its worker {times} times before it was done, the last time after {seconds:.0f} s, "
        "because HTCondor ended the worker's job. It runs again each time. If it takes longer than the pool lets a job "
        "run, divide it, or ask for slots that last longer (worker.requirements, worker.extra_submit); if it is "
        "shorter, set worker.lifetime to the pool's limit less the time that it takes"
    )


def _described(running: dict[str, float]) -> str:
    return ", ".join(f"{key} (runs for {seconds:.0f} s)" for key, seconds in running.items())
