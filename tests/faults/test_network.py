"""The network between one worker and the scheduler is cut, for ten seconds and for good."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing
from urllib.parse import urlparse

import pytest

from prefect_htcdask.scheduler.heartbeats import WORKER_TTL
from prefect_htcdask.settings import ENV_PREFIX
from tests.faults import network
from tests.faults.arena import Arena
from tests.faults.flow_process import FlowProcess
from tests.faults.row import Row
from tests.faults.wrapped_python import own_network
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.pool, pytest.mark.faults, pytest.mark.faults_long, pytest.mark.timeout(600)]

NewFlow = Callable[..., FlowProcess]
CUT = 10.0


@pytest.mark.parametrize("for_good", [False, True], ids=["for 10 s", "for good"])
def test_network_cut(for_good: bool, arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """network between a worker and the scheduler cut"""
    if reason := network.missing():
        pytest.skip(reason)
    python, claim = own_network(arena.directory)
    proxy, api = (int(urlparse(url).port or 0) for url in (arena.endpoint.gateway_address, arena.server.url))
    with (
        network.host_side() as wire,
        closing(network.Relay(proxy)) as to_proxy,
        closing(network.Relay(api)) as to_api,
    ):
        # A gateway and an API that are not on loopback, as a site's are.
        flow = new_flow(
            {
                "PREFECT_API_URL": f"http://{network.HOST}:{to_api.port}/api",
                f"{ENV_PREFIX}GATEWAY_ADDRESS": arena.endpoint.gateway_address,
                f"{ENV_PREFIX}GATEWAY_PROXY_ADDRESS": f"{network.HOST}:{to_proxy.port}",
                f"{ENV_PREFIX}GATEWAY_USERNAME": arena.endpoint.username,
                f"{ENV_PREFIX}GATEWAY_PASSWORD": arena.endpoint.password,
                f"{ENV_PREFIX}CONDOR_CONFIG_FILE": str(arena.endpoint.condor_config),
                f"{ENV_PREFIX}WORKER_PYTHON": str(python),
            },
            minimum=2,
        ).start()
        wait_until((claim / "pid").exists, 60, f"a worker waits for its network: {flow.tail()}")
        network.plug_in(claim)
        flow.compute()
        away = [task for task in ("g0", "g1") if _namespace(flow.runs(task)) != _namespace(os.getpid())]
        assert len(away) == 1, f"of g0 and g1 {away} run in a network of their own"
        since = time.time()
        network.cut(wire)
        if for_good:
            flow.runs(away[0], 2, timeout=200)
            after = time.time() - since
            row.note = f"its task ran again {after:.0f} s after the cut"
            row.expect(after < WORKER_TTL + 30, "it took too long")
        else:
            time.sleep(CUT)  # the fault itself
            network.mend(wire)
        flow.let_go()
        row.expect(flow.wait(150) == 0, f"the flow failed: {flow.tail(5)}")
        # A worker that is cut off finds nobody to take its leave of, until its vacate time is over.
        row.gone(arena, flow.said("ended")["time"], 60 if for_good else 20, 20)
        row.judge(arena, [flow], ["Completed"], again=1 if for_good else 0)
    row.check()


def _namespace(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")
