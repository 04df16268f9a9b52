"""Hearing of the ends of Dask's futures, on a real scheduler and workers."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import distributed
import pytest

from prefect_htcdask.compat.dask import CallbackEvent, on_end
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def client() -> Iterator[distributed.Client]:
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


# The workers are threads of this process.
gates: defaultdict[str, threading.Event] = defaultdict(threading.Event)


def gated(gate: str) -> str:
    assert gates[gate].wait(60)
    return gate


def failing(gate: str) -> None:
    raise ValueError(gated(gate))


def listen(client: distributed.Client, future: distributed.Future[Any]) -> list[str]:
    """Statuses of the future whenever its end was heard of; listening by the time that this returns."""
    heard: list[str] = []

    async def in_the_loop() -> None:
        on_end(future, lambda: heard.append(future.status))

    client.sync(in_the_loop)
    return heard


@pytest.mark.parametrize(("function", "status"), [(gated, "finished"), (failing, "error")])
def test_an_end_is_heard_of_once_and_others_may_wait_as_dask_does(
    client: distributed.Client, function: Any, status: str
) -> None:
    future = client.submit(function, f"{status} gate", pure=False)
    heard, again = listen(client, future), listen(client, future)
    done: list[Any] = []
    future.add_done_callback(done.append)
    assert heard == again == done == []
    gates[f"{status} gate"].set()
    future.exception(timeout=30)
    wait_until(lambda: len(heard) == len(again) == len(done) == 1, 10, "all have heard")
    assert heard == again == [status]
    assert listen(client, future) == [status], "at once where it has ended"


def test_a_cancelled_future_has_ended(client: distributed.Client) -> None:
    future = client.submit(gated, "never", pure=False)
    heard = listen(client, future)
    client.cancel([future])
    wait_until(lambda: heard == ["cancelled"], 10, "it is heard of")
    gates["never"].set()


def test_who_waits_first_is_not_disturbed(client: distributed.Client) -> None:
    future = client.submit(gated, "first", pure=False)
    waiting = threading.Thread(target=future.exception, args=(30,))
    waiting.start()
    wait_until(lambda: future._state._event is not None, 10, "Dask waits")
    heard = listen(client, future)
    gates["first"].set()
    waiting.join(30)
    wait_until(lambda: heard == ["finished"], 10, "it is heard of")


async def test_a_bell_is_an_event_that_rings_once() -> None:
    rings: list[int] = []
    bell = CallbackEvent(lambda: rings.append(1))
    waiting = [asyncio.ensure_future(bell.wait()) for _ in range(2)]
    await asyncio.sleep(0)
    assert not bell.is_set() and rings == []
    bell.set()
    assert await asyncio.wait_for(asyncio.gather(*waiting, bell.wait()), 5) == [True] * 3
    bell.clear()
    assert not bell.is_set()
    late = asyncio.ensure_future(bell.wait())
    await asyncio.sleep(0)
    assert not late.done()
    bell.set()
    assert await asyncio.wait_for(late, 5) and rings == [1]
