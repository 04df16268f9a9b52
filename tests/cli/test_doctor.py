"""The doctor, on the real pool, gateway and Prefect server, well and broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_htcdask.cli.doctor.checks import Check, CheckFailed, CheckSkipped, Finding, run_checks
from prefect_htcdask.cli.doctor.command import examine
from prefect_htcdask.condor.schedd import ScheddClient
from prefect_htcdask.embedded import EmbeddedEndpoint
from prefect_htcdask.embedded.ports import free_port
from prefect_htcdask.settings import ENV_PREFIX, load_settings
from prefect_htcdask.settings.sources import stated_settings
from tests.support.cluster_fixtures import SMALL, gateway_clusters, jobs_of
from tests.support.command_line import run
from tests.support.prefect_fixtures import PrefectServer
from tests.support.terminal import in_terminal
from tests.support.waiting import wait_until

LINKS = 14
SMALL_WORKERS = {f"{ENV_PREFIX}WORKER_{name.upper()}": value for name, value in SMALL.items()}


def configured(endpoint: EmbeddedEndpoint, **changes: dict[str, Any]) -> Any:
    """Settings that name the session's gateway and pool as a site's, with changes."""
    gateway = {
        "address": endpoint.gateway_address,
        "proxy_address": endpoint.proxy_address,
        "username": endpoint.username,
        "password": endpoint.password,
    }
    return load_settings(
        gateway={**gateway, **changes.get("gateway", {})},
        condor={"config_file": str(endpoint.condor_config), **changes.get("condor", {})},
        worker={**SMALL, **changes.get("worker", {})},
    )


def by_name(settings: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(settings)}


def broken(findings: dict[str, Finding]) -> list[str]:
    return [name for name, finding in findings.items() if finding.status == "broken"]


def not_tried(findings: dict[str, Finding]) -> set[str]:
    return {name for name, finding in findings.items() if finding.status == "not tried"}


def test_links_that_hang_on_a_broken_one_are_not_tried_and_the_others_are() -> None:
    def breaks() -> str:
        raise CheckFailed("seen", "do this")

    def cannot() -> str:
        raise CheckSkipped("no room")

    def raises() -> str:
        raise OSError()

    tried: list[str] = []
    found = list(
        run_checks(
            [
                Check("a", breaks, "do that"),
                Check("b", lambda: "well", "-", ("a",)),
                Check("c", lambda: "well", "-"),
                Check("d", lambda: "well", "-", ("c", "b")),
                Check("e", raises, "do that", ("c",)),
                Check("f", cannot, "make room", ("c",)),
                Check("g", lambda: "well", "-", ("f",)),
            ],
            tried.append,
        )
    )
    assert [(one.name, one.ok, one.status, one.detail, one.remedy) for one in found] == [
        ("a", False, "broken", "seen", "do this"),
        ("b", False, "not tried", "it needs the link 'a'", ""),
        ("c", True, "ok", "well", ""),
        ("d", False, "not tried", "it needs the link 'b'", ""),
        ("e", False, "broken", "OSError", "do that"),
        ("f", False, "not tried", "no room", "make room"),
        ("g", False, "not tried", "it needs the link 'f'", ""),
    ]
    assert tried == ["a", "c", "e", "f"]


def test_each_setting_is_told_with_its_source_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.delenv("PREFECT_PROFILES_PATH", raising=False)
    (tmp_path / "prefect.toml").write_text(
        '[integrations.htcdask.worker]\nmemory = "2 GiB"\ncpus = 2\n'
        '[integrations.htcdask.gateway]\ntoken = "hush-token"\n'
    )
    (tmp_path / "profiles.toml").write_text(
        f'active = "site"\n[profiles.site]\n{ENV_PREFIX}WORKER_CPUS = "3"\n{ENV_PREFIX}CONDOR_SCHEDD = "submit"\n'
    )
    monkeypatch.setenv("PREFECT_PROFILE", "site")
    monkeypatch.setenv(f"{ENV_PREFIX}GATEWAY_PASSWORD", "hush-password")
    monkeypatch.setenv(f"{ENV_PREFIX}GATEWAY_ADDRESS", "https://anne:hush@gateway.example.org/x")
    monkeypatch.setenv(f"{ENV_PREFIX}WORKER_ENVIRONMENT", '{"TOKEN": "hush"}')
    monkeypatch.setenv(f"{ENV_PREFIX}WORKERS", '{"fat": {"extra_submit": {"x": "hush"}}}')
    told = {name: (value, source) for name, value, source in stated_settings(load_settings(lease={"duration": 60}))}
    assert told.pop("worker.memory") == (str(2 * 1024**3), "prefect.toml")
    assert told.pop("worker.cpus") == ("2", "prefect.toml"), "it comes before the profile"
    assert told.pop("condor.schedd") == ("'submit'", f"{ENV_PREFIX}CONDOR_SCHEDD in the Prefect profile")
    assert told.pop("gateway.password") == ("(secret)", f"environment variable {ENV_PREFIX}GATEWAY_PASSWORD")
    assert told.pop("gateway.token") == ("(secret)", "prefect.toml")
    assert told.pop("gateway.address")[0] == "'https://(secret)@gateway.example.org/x'"
    assert told.pop("worker.environment")[0] == "{TOKEN: …}"
    assert told.pop("workers") == ("fat", f"environment variable {ENV_PREFIX}WORKERS")
    assert told.pop("lease.duration") == ("60", "given by the caller")
    assert not [name for name in told if not name.startswith("embedded.")]


def test_a_wrong_setting_is_a_finding_too() -> None:
    result = run("doctor", "--json", **{f"{ENV_PREFIX}WORKER_MEMORY": "lots"})
    found = json.loads(result.stdout)
    assert result.returncode == 1 and len(found) == LINKS
    assert (found[0]["name"], found[0]["status"]) == ("settings", "broken")
    assert "worker.memory" in found[0]["detail"] and found[0]["remedy"]
    assert {finding["status"] for finding in found[1:]} == {"not tried"}


@pytest.mark.pool
def test_all_is_well(condor_environment: EmbeddedEndpoint, prefect_server: PrefectServer, queue: ScheddClient) -> None:
    result = run("doctor", "--json", **SMALL_WORKERS)
    found = {finding["name"]: finding for finding in json.loads(result.stdout)}
    assert [finding for finding in found.values() if not finding["ok"]] == []
    assert result.returncode == 0 and len(found) == LINKS
    assert all(finding["seconds"] >= 0 and finding["remedy"] == "" for finding in found.values())
    assert f"{ENV_PREFIX}WORKER_MEMORY" in found["settings"]["detail"]
    assert "daskgateway-" in found["scheduler reached through the proxy"]["detail"]
    assert prefect_server.url in found["Prefect API reachable from the worker"]["detail"]
    assert "4.00 MiB from " in found["data goes from worker to worker"]["detail"]
    assert "reads what is written here" in found["results are stored where workers share them"]["detail"]
    assert "moved on by" in found["lease is renewed"]["detail"]
    assert jobs_of(queue) == [] and gateway_clusters(condor_environment) == []


@pytest.mark.pool
def test_a_worker_that_cannot_start(condor_environment: EmbeddedEndpoint, prefect_server: PrefectServer) -> None:
    found = by_name(load_settings(worker={"python": "/nonexistent/python", **SMALL}))
    assert broken(found) == ["worker jobs start and join"]
    told = found["worker jobs start and join"]
    assert "/nonexistent/python" in told.detail and "worker.python" in told.remedy
    assert found["removal"].ok and len(not_tried(found)) == 5


@pytest.mark.pool
def test_a_wrong_password(condor_environment: EmbeddedEndpoint) -> None:
    found = by_name(configured(condor_environment, gateway={"password": "hush-wrong"}))
    assert broken(found) == ["gateway answers and lets us in"]
    told = found["gateway answers and lets us in"]
    assert "does not accept our login" in told.detail and "gateway.password" in told.remedy
    assert found["schedd takes our jobs"].ok, "it does not hang on the gateway"
    assert "gateway starts a scheduler" in not_tried(found)
    assert "hush" not in str(found)


@pytest.mark.pool
def test_a_dead_proxy_port(condor_environment: EmbeddedEndpoint) -> None:
    dead = f"127.0.0.1:{free_port()}"
    found = by_name(configured(condor_environment, gateway={"proxy_address": dead}))
    assert broken(found) == ["gateway's proxy takes connections"]
    told = found["gateway's proxy takes connections"]
    assert dead in told.detail and "gateway.proxy_address" in told.remedy
    assert found["schedd takes our jobs"].ok and "gateway starts a scheduler" in not_tried(found)


@pytest.mark.pool
def test_a_schedd_that_is_down(condor_environment: EmbeddedEndpoint) -> None:
    condor = {"collector": f"127.0.0.1:{free_port()}", "schedd": "nobody@nowhere.example"}
    found = by_name(configured(condor_environment, condor=condor))
    assert broken(found) == ["schedd takes our jobs"]
    told = found["schedd takes our jobs"]
    assert "nobody@nowhere.example" in told.detail and "condor.schedd" in told.remedy
    assert found["gateway's proxy takes connections"].ok
    assert gateway_clusters(condor_environment) == [], "no scheduler is started for workers that cannot be had"


@pytest.mark.pool
def test_an_api_that_the_worker_cannot_reach(
    condor_environment: EmbeddedEndpoint, prefect_server: PrefectServer, queue: ScheddClient
) -> None:
    dead = f"http://127.0.0.1:{free_port()}/api"
    with temporary_settings({PREFECT_API_URL: dead}):
        found = by_name(load_settings(worker=SMALL))
    assert broken(found) == ["Prefect API reachable from the worker"]
    told = found["Prefect API reachable from the worker"]
    assert dead in told.detail
    assert "does not answer here either" in told.remedy and "PREFECT_API_URL" in told.remedy
    assert found["data goes from worker to worker"].ok and found["removal"].ok and not not_tried(found)
    assert jobs_of(queue) == []


@pytest.mark.pool
def test_ctrl_c_leaves_nothing_behind(condor_environment: EmbeddedEndpoint, queue: ScheddClient) -> None:
    with in_terminal("doctor", **SMALL_WORKERS) as terminal:
        terminal.shows("scheduler reached through the proxy: ")
        wait_until(lambda: jobs_of(queue), 30, "the test workers' jobs")
        assert terminal.press_ctrl_c() not in (None, 0)
        assert "Traceback" not in terminal.text
    wait_until(lambda: not jobs_of(queue), 30, "no job any more")
    wait_until(lambda: not gateway_clusters(condor_environment), 30, "no cluster any more")
