"""Prefect's own services, as a worker has them send what it queues: in batches, whole and in order."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest
from prefect._internal.concurrency.services import BatchedQueueService, QueueService

from prefect_htcdask.worker import prefect_services
from prefect_htcdask.worker.prefect_services import BatchThread, send_in_batches
from tests.support.waiting import wait_until


def one_by_one() -> Any:
    """A service as `EventsWorker` is one, that notes what it handles."""

    class OneByOne(QueueService[int]):
        handled: list[int] = []

        async def _handle(self, item: int) -> None:
            if item == 13:
                raise ValueError("a bad item")
            self.handled.append(item)

    return OneByOne


def batch_by_batch() -> Any:
    """A service as `APILogWorker` is one, that notes what it handles."""

    class BatchByBatch(BatchedQueueService[int]):
        _max_batch_size = 50
        _min_interval = 0.2
        handled: list[int] = []

        async def _handle_batch(self, items: list[int]) -> None:
            self.handled.extend(items)

    return BatchByBatch


@pytest.fixture(params=[one_by_one, batch_by_batch])
def service(request: pytest.FixtureRequest) -> Any:
    """A class of services, made for this test alone."""
    made = request.param()
    send_in_batches(made)
    return made


def test_all_is_handled_in_order(service: Any) -> None:
    instance = service.instance()
    for burst in range(3):
        for item in range(100 * burst + 20, 100 * burst + 120):
            instance.send(item)
        wait_until(lambda: len(service.handled) == 100 * (burst + 1), 10, "the burst is handled")  # noqa: B023
    assert service.handled == list(range(20, 320))
    service.drain_all(timeout=10)


def test_the_thread_is_asked_once_for_a_burst(service: Any) -> None:
    instance = service.instance()
    thread = instance._queue_get_thread
    assert isinstance(thread, BatchThread)
    for item in range(20, 220):
        instance.send(item)
        time.sleep(0.0005)
    wait_until(lambda: len(service.handled) == 200, 10, "all is handled")
    # For the first item, and once it waits for the next burst: or more, for this process had its breaks.
    assert thread._thread._submitted_count < 20
    service.drain_all(timeout=10)


def test_what_is_queued_as_it_ends_is_handled_without_delay(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefect_services, "PAUSE", 0.5)
    instance = service.instance()
    for item in range(20, 220):
        instance.send(item)
    began = time.monotonic()
    done, not_done = service.drain_all(timeout=10)
    assert service.handled == list(range(20, 220))
    assert len(done) == 1 and not not_done
    assert time.monotonic() - began < 5
    # And the next one begins anew.
    service.instance().send(300)
    service.drain_all(timeout=10)
    assert service.handled[-1] == 300


def test_what_cannot_be_handled_spares_the_rest() -> None:
    service = one_by_one()
    send_in_batches(service)
    for item in (12, 13, 14):
        service.instance().send(item)
    service.drain_all(timeout=10)
    assert service.handled == [12, 14]


def test_services_of_another_kind_are_left_as_they_are() -> None:
    class Other:
        def __init__(self, name: str, *, size: int = 0) -> None:
            self.name, self.size = name, size

    send_in_batches(Other)
    assert vars(Other("other", size=2)) == {"name": "other", "size": 2}


PRELOADED = """
import asyncio, gc, types
from prefect.events.clients import NullEventsClient
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect_htcdask.worker.run_task import dask_setup

asyncio.run(dask_setup(types.SimpleNamespace()))
for service in (EventsWorker(NullEventsClient, ()), APILogWorker()):
    print(type(service._queue_get_thread).__name__)
print(gc.get_freeze_count() > 50_000)
"""


def test_the_preload_of_a_worker_has_prefects_services_do_so() -> None:
    """In a process of its own, which it changes for good."""
    done = subprocess.run([sys.executable, "-c", PRELOADED], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["BatchThread", "BatchThread", "True"], done.stderr
