"""Another user of the flow's host is after what is ours."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from urllib.parse import urlparse

import psutil
import pytest

from prefect_htcdask.embedded import status
from tests.faults.arena import Arena, kill
from tests.faults.flow_process import FlowProcess
from tests.faults.row import Row, flow_message
from tests.support.stranger import stranger
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.pool, pytest.mark.faults]

NewFlow = Callable[..., FlowProcess]
HELD = 20.0
"""Seconds that the other user has the port: several looks of the flow's and the supervisor's at the gateway."""


def test_the_gateway_s_port_taken(arena: Arena, row: Row, new_flow: NewFlow) -> None:
    """gateway proxy killed mid-flow, its port taken by another user, who is told no secret: lost tasks run again"""
    flow = new_flow().start().compute()
    keeper = psutil.Process(status(arena.settings)["keeper"])
    lost = arena.pid_of("proxy")
    keeper.suspend()
    try:
        kill(lost)
        wait_until(lambda: psutil.Process(lost).status() == psutil.STATUS_ZOMBIE, 30, "the proxy is dead")
        taken = stranger(int(urlparse(arena.endpoint.gateway_address).port or 0))
        other = taken.__enter__()
    finally:
        keeper.resume()
    try:
        row.expect(other.port != 0, "the other user did not get the port")
        message = wait_until(lambda: status(arena.settings)["message"], 60, "the keeper says who has the port")
        row.expect("is listened to by user" in message, f"the keeper says {message!r}")
        time.sleep(HELD)
    finally:
        taken.__exit__(None, None, None)
    login = f"{arena.endpoint.username}:{arena.endpoint.password}".encode()
    secrets = (arena.endpoint.password.encode(), base64.b64encode(login), b"uthorization", b"ookie", b"token")
    told = [secret.decode() for secret in secrets if secret in other.heard]
    row.expect(not told, f"the other user was told {told}")
    wait_until(arena.is_well, 60, "the proxy is back")
    for task in ("g0", "g1"):
        flow.runs(task, 2)
    flow.let_go()
    row.expect(flow.wait(120) == 0, f"the flow failed: {flow_message(arena, flow)}")
    row.gone(arena, flow.said("ended")["time"], 30, 30)
    row.judge(arena, [flow], ["Completed"], again=2)
    row.check()
