"""Workers of which nothing is heard are given up, and no others: not those whose task keeps the interpreter's lock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_htcdask.gateway import HTCGatewayCluster
from prefect_htcdask.scheduler import heartbeats, plugin
from prefect_htcdask.scheduler.heartbeats import INTERVAL, Heartbeats
from tests.support.cluster_fixtures import texts
from tests.support.dask_cluster import dask_cluster, gate, wait

looks = st.lists(st.tuples(st.floats(0.1, 1000), st.booleans()), max_size=40)


@given(looks, st.floats(1, 100))
def test_a_worker_is_lost_when_it_was_silent_for_as_long_as_somebody_listened(
    seen: list[tuple[float, bool]], limit: float
) -> None:
    listener, word, silent = Heartbeats(), 0, 0.0
    assert listener.lost({"w": word}, 1e6, limit) == [], "it has just come"
    for elapsed, speaks in seen:
        word += speaks
        # A scheduler that was held up for long has heard nobody meanwhile.
        silent = 0.0 if speaks else silent + min(elapsed, 2 * INTERVAL)
        assert listener.lost({"w": word}, elapsed, limit) == (["w"] if silent > limit else [])
    assert listener.lost({}, 1.0, limit) == []
    assert listener.lost({"w": word}, 1e6, limit) == [], "it has come back"


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second of silence is enough."""
    monkeypatch.setattr(plugin, "WORKER_TTL", 0.5)
    monkeypatch.setattr(plugin, "heartbeat_interval", lambda workers: 0.01)
    for module in (plugin, heartbeats):
        monkeypatch.setattr(module, "INTERVAL", 0.1)


async def test_tasks_of_a_silent_worker_run_elsewhere(hurried: None) -> None:
    async with dask_cluster() as cluster:
        lost = await cluster.add_worker(1)
        foreign = await cluster.add_worker(1, name="foreign")
        running = cluster.client.submit(wait, 1, workers=[lost.address], allow_other_workers=True)
        await cluster.until(lambda: cluster.scheduler.workers[lost.address].processing, "in hand")
        for worker in (lost, foreign):
            worker.periodic_callbacks["heartbeat"].stop()
        # Somebody else speaks for it.
        for _ in range(12):
            assert await cluster.plugin.alive(lost.address)
            await asyncio.sleep(0.1)
        assert lost.address in cluster.scheduler.workers
        await cluster.until(lambda: lost.address not in cluster.scheduler.workers, "it is given up")
        assert not await cluster.plugin.alive(lost.address)
        assert foreign.address in cluster.scheduler.workers, "which is none of ours to judge"
        await cluster.until(lambda: cluster.scheduler.workers[foreign.address].processing, "its task is elsewhere")
        gate(1).set()
        assert await running == 1


@pytest.mark.pool
def test_a_task_that_keeps_the_interpreter_s_lock_keeps_its_worker(
    new_cluster: Callable[..., HTCGatewayCluster],
    messages: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    # The plugin travels by value, and this with it.
    monkeypatch.setattr(plugin, "WORKER_TTL", 35.0)
    path = tmp_path / "begun"

    def deaf(path: str) -> str:
        import ctypes

        from distributed import get_worker

        with open(path, "a") as stream:
            stream.write(f"{get_worker().name}\n")
        # PyDLL keeps the lock: neither heartbeats nor signals are seen to.
        ctypes.PyDLL(None).sleep(60)
        return str(get_worker().name)

    def silent_for(dask_scheduler: Any) -> float:
        from distributed.metrics import time

        return max(time() - ws.last_seen for ws in dask_scheduler.workers.values())

    with new_cluster(n_workers=2) as cluster, cluster.get_client() as client:
        client.wait_for_workers(2, timeout=60)
        future = client.submit(deaf, str(path))
        name = future.result(timeout=120)
        assert path.read_text().split() == [name]
        assert len(client.scheduler_info(n_workers=-1)["workers"]) == 2
        assert client.run_on_scheduler(silent_for) < 30
    assert texts(messages, "log") == ""
