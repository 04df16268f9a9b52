"""Which gateway, which schedd: arguments, then settings, then Dask's configuration, then the embedded pool."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import dask
import pytest
from dask_gateway.auth import BasicAuth, JupyterHubAuth

from prefect_htcdask.gateway.endpoints import gateway_auth, resolve_endpoints, worker_offers, worker_spec, worker_specs
from prefect_htcdask.settings import HTCDaskSettings, SettingsError, load_settings


@pytest.fixture(autouse=True)
def no_configured_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDOR_CONFIG", "ONLY_ENV")


def configured(**groups: Any) -> HTCDaskSettings:
    return load_settings(**{"condor": {"collector": "pool:9618"}, "embedded": {"enabled": False}, **groups})


def test_an_argument_wins_over_a_setting_and_a_setting_over_dask() -> None:
    with dask.config.set({"gateway.address": "http://dask"}):
        both = configured(gateway={"address": "http://setting"})
        assert resolve_endpoints(both, address="http://argument").address == "http://argument"
        assert resolve_endpoints(both).address == "http://setting"
        assert resolve_endpoints(configured()).address == "http://dask"


def test_the_schedd_is_the_settings() -> None:
    parts = resolve_endpoints(
        configured(gateway={"address": "http://g"}, condor={"collector": "c", "schedd": "s", "spool": True})
    )
    assert (parts.schedd.collector, parts.schedd.schedd, parts.schedd.spool) == ("c", "s", True)
    assert not parts.embedded


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({}, ["Dask Gateway", "gateway.address", "embedded.enabled"]),
        ({"gateway": {"address": "http://g"}, "condor": {}}, ["HTCondor pool", "condor.collector"]),
        ({"gateway": {"address": "gateway.example.org"}}, ["gateway.address", "gateway.example.org", "http://"]),
    ],
)
def test_what_is_missing_or_wrong_is_named(groups: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve_endpoints(configured(**groups))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_password_means_basic_and_a_token_jupyterhub() -> None:
    basic = gateway_auth(load_settings(gateway={"username": "u", "password": "p"}).gateway, None)
    assert isinstance(basic, BasicAuth) and (basic.username, basic.password) == ("u", "p")
    hub = gateway_auth(load_settings(gateway={"token": "t"}).gateway, None)
    assert isinstance(hub, JupyterHubAuth)


def test_an_unknown_kind_of_login_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("smoke-signals", "no.such.Class"):
        with pytest.raises(SettingsError) as caught:
            gateway_auth(load_settings(gateway={"auth": kind}).gateway, None)
        assert "gateway.auth" in str(caught.value) and kind in str(caught.value)
    monkeypatch.delenv("JUPYTERHUB_API_TOKEN", raising=False)
    with pytest.raises(SettingsError, match=r"gateway\.auth = 'jupyterhub'"):
        gateway_auth(load_settings(gateway={"auth": "jupyterhub"}).gateway, None)


def test_a_container_has_its_own_python(tmp_path: Path) -> None:
    image = tmp_path / "image.sif"
    image.touch()
    assert worker_spec(load_settings().worker).python == sys.executable
    assert worker_spec(load_settings(worker={"container_image": str(image)}).worker).python == "python3"
    spec = worker_spec(load_settings(worker={"image": "daskdev/dask:1"}).worker)
    assert (spec.container_image, spec.python) == ("docker://daskdev/dask:1", "python3")
    chosen = worker_spec(load_settings(worker={"image": "x", "python": "/opt/conda/bin/python"}).worker)
    assert chosen.python == "/opt/conda/bin/python"


def test_an_image_that_does_not_exist_is_named() -> None:
    with pytest.raises(SettingsError) as caught:
        worker_spec(load_settings(worker={"container_image": "/no/such.sif"}).worker)
    assert all(word in str(caught.value) for word in ("worker.container_image", "/no/such.sif", "docker://"))


def test_threads_are_the_cores_unless_said() -> None:
    assert worker_spec(load_settings(worker={"cpus": 4}).worker).threads == 4
    assert worker_spec(load_settings(worker={"cpus": 4, "nthreads": 2}).worker).threads == 2


def test_what_the_workers_of_each_group_offer() -> None:
    assert worker_offers(load_settings()) == {"default": {}}
    assert worker_offers(load_settings(worker={"gpus": 2, "resources": {"licence": 1}})) == {
        "default": {"GPU": 2, "licence": 1}
    }
    workers = {"cpu": {"cpus": 8, "nthreads": 4}, "gpu": {"gpus": 1, "resources": {"GPU": 3}}}
    settings = load_settings(workers=workers, worker={"memory": "1 GiB"})
    assert worker_offers(settings) == {
        "cpu": {"htcdask-group-cpu": 4},
        "gpu": {"htcdask-group-gpu": 1, "GPU": 3},
    }
    cpu, gpu = worker_specs(settings).values()
    assert (cpu.cpus, cpu.threads, cpu.memory, dict(cpu.resources)) == (8, 4, 2**30, {"htcdask-group-cpu": 4})
    assert (gpu.gpus, dict(gpu.resources)) == (1, {"htcdask-group-gpu": 1, "GPU": 3})


def test_a_lifetime_is_staggered_by_a_tenth_unless_said_otherwise() -> None:
    def stagger(**worker: str) -> float | None:
        return worker_spec(load_settings(worker=worker).worker).lifetime_stagger

    assert stagger() is None
    assert stagger(lifetime="1 h") == 360
    assert stagger(lifetime="1 h", lifetime_stagger="0 s") == 0
    assert stagger(lifetime="1 h", lifetime_stagger="5 m") == 300


def test_a_group_s_missing_image_is_named_with_its_group() -> None:
    with pytest.raises(SettingsError, match=r"workers\.gpu\.container_image = '/no/such\.sif' does not exist"):
        worker_specs(load_settings(workers={"cpu": {}, "gpu": {"container_image": "/no/such.sif"}}))


def test_dask_s_configuration_is_filled_in_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUB_HOST", "hub.example.org")
    monkeypatch.setenv("HUB_USER", "anna")
    written = {
        "gateway.address": "https://{HUB_HOST}/services/dask-gateway",
        "gateway.proxy-address": "gateway://{HUB_HOST}:8786",
        "gateway.public-address": "https://{HUB_HOST}/user/{HUB_USER}",
        "gateway.auth.type": "basic",
        "gateway.auth.kwargs": {"username": "{HUB_USER}", "password": "p"},
    }
    with dask.config.set(written):
        parts = resolve_endpoints(configured())
        assert parts.address == "https://hub.example.org/services/dask-gateway"
        assert parts.proxy_address == "gateway://hub.example.org:8786"
        assert parts.public_address == "https://hub.example.org/user/anna"
        for auth in (None, "basic"):
            login = gateway_auth(configured(gateway={"auth": auth} if auth else {}).gateway, None)
            assert isinstance(login, BasicAuth) and (login.username, login.password) == ("anna", "p")
        # What is set for prefect_htcdask counts more.
        own = gateway_auth(configured(gateway={"username": "bert", "password": "q"}).gateway, None)
        assert isinstance(own, BasicAuth) and (own.username, own.password) == ("bert", "q")


@pytest.mark.parametrize("name", ["address", "proxy-address", "public-address", "auth.kwargs"])
def test_a_variable_that_is_not_set_is_named(name: str) -> None:
    value: Any = "http://{NO_SUCH_VARIABLE}"
    written = {
        "gateway.address": "http://g",
        f"gateway.{name}": {"username": value} if name == "auth.kwargs" else value,
    }
    with dask.config.set(written), pytest.raises(SettingsError) as caught:
        resolve_endpoints(configured())
    assert f"gateway.{name}" in str(caught.value) and "NO_SUCH_VARIABLE" in str(caught.value)


def test_a_proxy_that_is_a_port_is_on_the_gateway_s_host() -> None:
    for address, local in (("http://127.0.0.1:8000", True), ("http://gateway.example.org", False)):
        assert resolve_endpoints(configured(), address=address, proxy_address=8786).workers_are_local is local
