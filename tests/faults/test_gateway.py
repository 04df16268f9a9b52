"""The gateway goes: its server, its proxy, and the Dask scheduler that it started."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import closing
from urllib.parse import urlparse

import pytest

from prefect_htcdask.condor.submit_description import cluster_digest
from prefect_htcdask.settings import ENV_PREFIX
from tests.faults.arena import Arena, kill
from tests.faults.flow_process import FlowProcess
from tests.faults.network import Relay
from tests.faults.row import Row, flow_message
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.pool, pytest.mark.faults]
long = pytest.mark.faults_long

NewFlow = Callable[..., FlowProcess]
AWAY = 30.0
"""Seconds that the gateway's server does not answer."""


def restart(arena: Arena, service: str, number: signal.Signals) -> None:
    """Signal a service of the keeper's, and wait until its successor answers."""
    lost = arena.pid_of(service)
    kill(lost, number=number)
    wait_until(lambda: arena.pid_of(service) != lost and arena.is_well(), 60, f"the {service} is back")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=long)], ids=lambda n: n.name)
def test_gateway_server_restarted(number: signal.Signals, arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """gateway server ended and started again mid-flow: nobody notices"""
    flow = new_flow().start().compute()
    restart(arena, "gateway", number)
    flow.let_go()
    row.expect(flow.wait(120) == 0, f"the flow failed: {flow_message(arena, flow)}")
    row.gone(arena, flow.said("ended")["time"], 20, 20)
    row.judge(arena, [flow], ["Completed"], again=0)
    row.check()


def clear_end(arena: Arena, row: Row, flow: FlowProcess, again: int, *words: str) -> None:
    """The flow completes, or fails with a reason that has one of `words` in it."""
    flow.let_go()
    status = flow.wait(150)
    message = flow_message(arena, flow)
    row.note = f"exit {status}; {message[:300]}"
    row.expect(status == 0 or any(word in message for word in words), f"the reason is not clear: {message}")
    row.gone(arena, flow.said("ended")["time"], 30, 30)
    row.judge(arena, [flow], ["Completed", "Failed"], again=again)
    row.check()


def taken_up(flow: FlowProcess) -> str:
    """What the flow's log says of the connection, once it is there again."""

    def look() -> list[str]:
        return [line for line in flow.log.read_text(errors="replace").splitlines() if "is there again after" in line]

    return str(wait_until(look, 60, "the connection is there again")[-1].partition(" - ")[2])


def test_proxy_lost(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """gateway proxy killed and started again mid-flow: the tasks of all workers, which were lost, run again"""
    flow = new_flow().start().compute()
    restart(arena, "proxy", signal.SIGKILL)
    for task in ("g0", "g1"):
        flow.runs(task, 2)
    flow.let_go()
    row.expect(flow.wait(120) == 0, f"the flow failed: {flow_message(arena, flow)}")
    row.note = taken_up(flow)
    row.gone(arena, flow.said("ended")["time"], 30, 30)
    row.judge(arena, [flow], ["Completed"], again=2)
    row.check()


def test_connection_of_the_flow_alone_lost(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """connections of the flow's process to the scheduler closed from outside: its tasks run on"""
    proxy = int(urlparse(arena.endpoint.gateway_address).port or 0)
    with closing(Relay(proxy, "127.0.0.1")) as relay:
        flow = new_flow(
            {
                f"{ENV_PREFIX}GATEWAY_ADDRESS": arena.endpoint.gateway_address,
                f"{ENV_PREFIX}GATEWAY_PROXY_ADDRESS": f"127.0.0.1:{relay.port}",
                f"{ENV_PREFIX}GATEWAY_USERNAME": arena.endpoint.username,
                f"{ENV_PREFIX}GATEWAY_PASSWORD": arena.endpoint.password,
                f"{ENV_PREFIX}CONDOR_CONFIG_FILE": str(arena.endpoint.condor_config),
            }
        )
        flow.start().compute()
        row.expect(relay.cut(flow.pid) > 0, "there was no connection to cut")
        row.note = taken_up(flow)
        flow.let_go()
        row.expect(flow.wait(120) == 0, f"the flow failed: {flow_message(arena, flow)}")
        row.gone(arena, flow.said("ended")["time"], 20, 20)
        row.judge(arena, [flow], ["Completed"], again=0)
    row.check()


@long
def test_scheduler_killed(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """SIGKILL of the Dask scheduler: a clear reason"""
    flow = new_flow().start().compute()
    since = time.time()
    kill(arena.scheduler_of(arena.clusters()[0]))
    clear_end(arena, row, flow, 4, "scheduler")
    row.expect(flow.said("ended")["time"] - since < 60, "it took more than a minute to say so")
    row.check()


@long
def test_scheduler_killed_and_the_flow_retried(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """SIGKILL of the Dask scheduler of a flow with one retry: the next attempt has a cluster of its own"""
    flow = new_flow(retries=1).start().compute()
    (lost,) = arena.clusters()
    kill(arena.scheduler_of(lost))
    flow.runs("g0", 2)
    row.expect(
        cluster_digest(lost) not in [job["HTCDaskClusterName"] for job in arena.jobs()],
        "jobs of the lost cluster are there",
    )
    flow.let_go()
    row.expect(flow.wait(120) == 0, f"the flow failed: {flow_message(arena, flow)}")
    row.gone(arena, flow.said("ended")["time"], 20, 20)
    # The whole flow runs again: three early tasks and two late ones.
    row.judge(arena, [flow], ["Completed"], again=5)
    row.check()


@long
def test_gateway_server_away_at_the_end(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """gateway server hanging for 30 s or more when the flow ends: its cluster goes then"""
    flow = new_flow().start().compute()
    server = arena.pid_of("gateway")
    # The keeper's child; the server may be a child of that.
    kill(server, number=signal.SIGSTOP)
    try:
        flow.let_go()
        started = time.time()
        status = flow.wait(120)
        took = time.time() - started
        row.note = f"exit {status} after {took:.1f} s"
        row.expect(took < 45, f"the flow's process took {took:.0f} s to end")
        time.sleep(max(0.0, AWAY - took))
    finally:
        kill(server, number=signal.SIGCONT)
    row.expect(status == 0, f"the flow failed: {flow.tail(5)}")
    row.gone(arena, time.time(), 30, 30)
    row.judge(arena, [flow], ["Completed"], again=0)
    row.check()
