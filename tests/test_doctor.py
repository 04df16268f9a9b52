"""The doctor, on the real pool, gateway and Prefect server."""

from __future__ import annotations

import httpx
import pytest

from prefect_htcdask.doctor import examine
from prefect_htcdask.settings import load_settings
from tests.prefect_fixtures import PrefectServer


@pytest.mark.pool
def test_doctor_finds_every_link_well(condor_environment: object, prefect_server: PrefectServer) -> None:
    findings = list(examine(load_settings(worker={"memory": "300 MiB", "disk": "100 MiB"})))
    assert [finding for finding in findings if not finding.ok] == []
    assert len(findings) == 7
    assert httpx.get(f"{prefect_server.url}/health").status_code == 200
    assert prefect_server.url in findings[-2].detail


@pytest.mark.pool
def test_doctor_names_the_link_that_is_broken(condor_environment: object, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(worker={"python": "/nonexistent/python", "memory": "300 MiB", "disk": "100 MiB"})
    findings = list(examine(settings))
    assert [finding.ok for finding in findings] == [True, True, True, False]
    assert "3 workers in a row" in findings[-1].detail
    assert "/nonexistent/python" in findings[-1].detail
