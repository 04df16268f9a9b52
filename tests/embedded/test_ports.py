"""Ports for servers that must know theirs beforehand (`embedded/ports.py`)."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from prefect_htcdask.embedded import ports


def kernel_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    file = tmp_path / "range"
    file.write_text(text)
    monkeypatch.setattr(ports, "EPHEMERAL", file)


def test_a_free_port_is_none_that_the_kernel_gives_to_others() -> None:
    low = int(ports.EPHEMERAL.read_text().split()[0])
    if low <= ports.LOWEST:
        pytest.skip(f"this host's own range begins at {low}")
    for _ in range(50):
        port = ports.free_port()
        assert ports.LOWEST <= port < low
        with socket.socket() as server:
            server.bind(("127.0.0.1", port))


def test_a_port_in_use_is_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", ports.free_port()))
        taken = server.getsockname()[1]
        monkeypatch.setattr(ports, "LOWEST", taken)
        kernel_s_own(tmp_path, monkeypatch, f"{taken + 1} 60999")
        assert ports.free_port() != taken


@pytest.mark.parametrize("text", ["1024 65535", "", "none at all"])
def test_a_host_that_leaves_no_room_gives_what_the_kernel_chooses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    kernel_s_own(tmp_path, monkeypatch, text)
    with socket.socket() as server:
        server.bind(("127.0.0.1", ports.free_port()))
