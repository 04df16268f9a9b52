"""The plugin on a scheduler whose environment has nothing of ours: it travels by value."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

from prefect_htcdask.gateway.supervisor_config import scheduler_plugins

ELSEWHERE = '''
import asyncio, importlib.abc, json, pickle, sys

class Missing(importlib.abc.MetaPathFinder):
    """A package that is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("prefect_htcdask", "prefect"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from distributed import Client, Scheduler, Worker
from distributed.core import rpc

async def main():
    try:
        import prefect_htcdask
    except ModuleNotFoundError:
        pass
    else:
        sys.exit("the package can be imported here, so that this tests nothing")
    plugins = pickle.load(open(sys.argv[1], "rb"))
    async with (
        Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0", dashboard=False) as scheduler,
        rpc(scheduler.address) as remote,
    ):
        for name, plugin in plugins.items():
            await remote.register_scheduler_plugin(plugin=plugin, name=name, idempotent=True)
        granted = await remote.htcdask_claim(owner="test")
        async with Client(scheduler.address, asynchronous=True, set_as_default=False) as client:
            waiting = [client.submit(abs, 1, resources={"GPU": 1}, pure=False) for _ in range(3)]
            none = client.submit(abs, 1, resources={"TPU": 1}, pure=False)
            total = client.submit(sum, waiting)
            while len(scheduler.tasks) < 5:
                await asyncio.sleep(0.01)
            before = await remote.htcdask_demand(owner="test", epoch=granted["epoch"])
            async with Worker(scheduler.address, name="htcdask-1.0", nthreads=1, resources={"GPU": 1}, dashboard=False):
                result = await total
                wish = await remote.htcdask_scale(request={"op": "scale", "n": 0, "group": "gpu"})
                after = await remote.htcdask_demand(owner="test", epoch=granted["epoch"])
                del waiting, total
                await client.cancel([none])
                while scheduler.tasks:
                    await asyncio.sleep(0.01)
                retired = await remote.htcdask_retire(names=["htcdask-1.0"], idle_only=True)
                await remote.htcdask_pardon(names=["htcdask-1.0-0"])
        recounts = scheduler.plugins["htcdask"].counter.recounts
    mine = sorted(name for name in sys.modules if name.startswith("prefect"))
    print(json.dumps([before, result, wish, after, retired, recounts, mine]))

asyncio.run(main())
'''


def test_it_works_where_this_package_is_not(tmp_path: Path) -> None:
    pickled = tmp_path / "plugins"
    pickled.write_bytes(pickle.dumps(scheduler_plugins(60.0, {"cpu": {}, "gpu": {"GPU": 1}})))
    script = tmp_path / "elsewhere.py"
    script.write_text(ELSEWHERE)
    run = subprocess.run([sys.executable, script, pickled], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    before, result, wish, after, retired, recounts, mine = json.loads(run.stdout)
    assert before["status"] == "ok"
    assert {name: group["queued"] for name, group in before["groups"].items()} == {"cpu": 0, "gpu": 3}
    assert before["unmatched"] == {"TPU=1": 1}
    assert result == 3
    assert wish == {"owner": "test", "number": 1}
    assert {name: group["queued"] for name, group in after["groups"].items()} == {"cpu": 0, "gpu": 0}
    assert after["joined"] == after["holding"] == ["htcdask-1.0"] and after["requests"][0]["number"] == 1
    assert set(after["durations"]) == {"abs", "sum"}
    assert retired == ["htcdask-1.0"]
    assert recounts == 0 and mine == []
