"""Whose the scheduler's plugin is: one supervisor, its lease, its wishes and its successor."""

from __future__ import annotations

import asyncio
import time

import pytest

from prefect_htcdask.scheduler.plugin import PLUGIN_NAME, DemandPlugin
from tests.support.dask_cluster import OFFERS, counted, dask_cluster, recount, wait


async def test_one_supervisor_owns_the_cluster() -> None:
    async with dask_cluster() as cluster:
        plugin = cluster.plugin
        plugin.lease, plugin.expires = 60.0, time.monotonic() + 60
        assert await plugin.claim("other") == {"granted": False, "owner": "test", "epoch": 1}
        plugin.expires = time.monotonic() - 1
        assert await plugin.claim("other") == {"granted": True, "owner": "other", "epoch": 2}
        assert await plugin.demand("test", 1) == {"status": "superseded", "owner": "other", "epoch": 2}
        plugin.expires = time.monotonic() - 1
        assert (await plugin.claim("test"))["epoch"] == 3
        tasks = cluster.client.map(wait, range(3), resources={"GPU": 1})
        await cluster.until(lambda: len(cluster.scheduler.unrunnable) == 3, "three tasks")
        assert set((await cluster.demand())["groups"]) == {"default"}
        # A new owner may have other groups; tasks are counted by those at once.
        assert (await plugin.claim("test", offers=OFFERS))["granted"]
        counter = plugin.counter
        assert (await cluster.demand())["groups"]["gpu"]["queued"] == 3
        assert (await plugin.claim("test", offers=OFFERS))["granted"] and plugin.counter is counter
        assert (await plugin.claim("test"))["granted"] and plugin.counter is counter
        del tasks


async def test_a_cluster_outlives_the_lease_of_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner's host may be asleep; only a cluster that nobody comes back to ends."""
    async with dask_cluster() as cluster:
        plugin = DemandPlugin(0.2, scheduler_lease=1.2)
        ended: list[float] = []

        async def end(why: str) -> None:
            ended.append(time.monotonic())

        monkeypatch.setattr(plugin, "end", end)
        with pytest.warns(UserWarning, match="overwriting"):
            await cluster.scheduler.register_scheduler_plugin(plugin, name=PLUGIN_NAME, idempotent=False)
        assert (await plugin.claim("test"))["granted"]
        await asyncio.sleep(0.5)  # the owner is asleep
        assert plugin.expires < time.monotonic() and not ended
        assert await cluster.demand(), "it is its owner's still"
        renewed = time.monotonic()
        assert not (await plugin.claim("other"))["granted"]
        await cluster.until(lambda: ended, "the cluster's end")
        assert ended[0] - renewed > 1.2


async def test_wishes_stand_beside_each_other_by_group() -> None:
    async with dask_cluster(OFFERS) as cluster:
        plugin = cluster.plugin
        assert (await cluster.demand())["requests"] == []
        await plugin.scale({"op": "scale", "n": 3, "group": "cpu"})
        await plugin.scale({"op": "adapt", "minimum": 0, "maximum": 9})
        await plugin.scale({"op": "scale", "n": 1, "group": "gpu"})
        assert (await plugin.scale({"op": "scale", "n": 4, "group": "cpu"}))["number"] == 4
        answer = await cluster.demand()
        assert answer["requests"] == [
            {"op": "adapt", "minimum": 0, "maximum": 9, "number": 2},
            {"op": "scale", "n": 1, "group": "gpu", "number": 3},
            {"op": "scale", "n": 4, "group": "cpu", "number": 4},
        ]


async def test_a_new_plugin_takes_over_from_the_one_before() -> None:
    async with dask_cluster() as cluster:
        before = cluster.plugin
        await before.scale({"op": "scale", "n": 3})
        await cluster.add_worker(1)
        tasks = cluster.client.map(wait, range(6))
        await cluster.until(lambda: len(cluster.scheduler.queued) == 4, "queued tasks")
        with pytest.warns(UserWarning, match="overwriting"):
            await cluster.scheduler.register_scheduler_plugin(
                DemandPlugin(0, OFFERS), name=PLUGIN_NAME, idempotent=False
            )
        await asyncio.sleep(0)
        assert before.task.cancelled()
        answer = await cluster.demand()
        assert (cluster.plugin.owner, cluster.plugin.epoch) == ("test", 1)
        assert answer["requests"][0]["n"] == 3
        assert answer["groups"]["cpu"]["queued"] == 4 and answer["in_hand"] == {"htcdask-1.0": 2}
        assert counted(cluster.plugin.counter) == recount(cluster.scheduler, OFFERS)
        # Installed once more as a client connects, the one that is there stays.
        await cluster.scheduler.register_scheduler_plugin(DemandPlugin(0), idempotent=True)
        assert set((await cluster.demand())["groups"]) == set(OFFERS)
        del tasks
