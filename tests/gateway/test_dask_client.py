"""Ctrl-C while a Dask client connects."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

import pytest

CONNECT = """
import sys
from {module} import {name}
{name}("tcp://127.0.0.1:" + sys.argv[1], timeout=40, set_as_default=False)
"""


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("prefect_htcdask.gateway.dask_client", "InterruptibleClient"),
        ("prefect_htcdask.runner.client.client", "ReconnectingClient"),
    ],
)
def test_a_process_ends_where_ctrl_c_meets_its_connecting(module: str, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        script = CONNECT.format(module=module, name=name)
        with subprocess.Popen(
            [sys.executable, "-c", script, str(silent.getsockname()[1])], stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                # It waits for the scheduler's greeting from here on.
                connection, _ = silent.accept()
                with connection:
                    process.send_signal(signal.SIGINT)
                    _, said = process.communicate(timeout=20)
            finally:
                process.kill()
    assert process.returncode == -signal.SIGINT
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert "Traceback" not in said.partition("Traceback")[2], said
