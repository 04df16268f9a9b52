"""What addresses say of where they lead."""

from __future__ import annotations

import pytest

from prefect_htcdask.utils.net import is_loopback


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://localhost:4200/api", True),
        ("localhost:80", True),
        ("hub.localhost:80", True),
        ("127.9.9.9:1", True),
        ("[::1]:80", True),
        ("http://0.0.0.0:4200/api", True),
        ("http://10.0.0.1", False),
        ("gateway.example.org:443", False),
        ("https://api.prefect.cloud/api", False),
        ("", False),
    ],
)
def test_loopback(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback
