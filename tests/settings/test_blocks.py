"""Credentials as Prefect blocks, on a real Prefect server: what they take, how they are found, what shows them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import pytest
from prefect.blocks.core import Block
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.testing.standard_test_suites import BlockStandardTestSuite

from prefect_htcdask import HTCDaskCondorCredentials, HTCDaskGatewayCredentials
from prefect_htcdask.embedded import EmbeddedEndpoint, find
from prefect_htcdask.embedded.ports import free_port
from prefect_htcdask.gateway import GatewayUnreachable, HTCGatewayCluster
from prefect_htcdask.gateway.credentials import condor_token, gateway_login
from prefect_htcdask.gateway.endpoints import resolve_endpoints
from prefect_htcdask.settings import HTCDaskSettings, SettingsError, load_settings
from tests.support.cluster_fixtures import SMALL
from tests.support.prefect_fixtures import PrefectServer

BLOCKS = (HTCDaskGatewayCredentials, HTCDaskCondorCredentials)
TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhbm5lQGxvY2FsaG9zdCJ9.c2lnbmF0dXJl"


@pytest.mark.parametrize("block", BLOCKS, indirect=True)
class TestStandard(BlockStandardTestSuite):
    """What Prefect asks of every block."""

    @pytest.fixture
    def block(self, request: pytest.FixtureRequest) -> type[Block]:
        """Each of ours, by the class's parameter."""
        kind: type[Block] = request.param
        return kind

    def test_has_a_valid_image(self, block: type[Block]) -> None:
        """The image is that of Prefect's own `Secret`; it is looked at where there is a network."""
        assert block._logo_url == Secret._logo_url
        try:
            super().test_has_a_valid_image(block)
        except (URLError, TimeoutError) as exc:
            assert not isinstance(exc, HTTPError), f"{block._logo_url} is gone"
            pytest.skip(f"the logo's host cannot be reached from here: {exc}")


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_example_of_a_block_runs(kind: type[Block], prefect_api: PrefectServer, tmp_path: Path) -> None:
    example = kind.get_code_example()
    assert example is not None
    # Prefect's word for a name that the reader fills in, in small letters.
    code = example.split("```python\n")[1].split("```")[0].replace("BLOCK_NAME", "block-name")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "*****" in done.stdout and "horse" not in done.stdout and "eyJ" not in done.stdout


def test_block_types_are_registered_and_loaded_by_their_slugs(prefect_api: PrefectServer, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "prefect", "block", "register", "-m", "prefect_htcdask"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(kind.get_block_type_name() in done.stdout for kind in BLOCKS)
    HTCDaskGatewayCredentials(password="p").save("slugged", overwrite=True)
    # A process that never imported us: Prefect finds the type by the package's entry point.
    code = (
        "from prefect.blocks.core import Block; print(type(Block.load('htcdask-gateway-credentials/slugged')).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["HTCDaskGatewayCredentials"], done.stderr


def test_a_saved_secret_is_shown_nowhere(prefect_api: PrefectServer) -> None:
    gateway = HTCDaskGatewayCredentials(username="anne", password="hunter2")
    condor = HTCDaskCondorCredentials(token=f" {TOKEN}\n")
    gateway.save("hidden", overwrite=True)
    condor.save("hidden", overwrite=True)
    with get_client(sync_client=True) as client:
        shown = [
            client.read_block_document_by_name("hidden", kind.get_block_type_slug(), False).data for kind in BLOCKS
        ]
    for text in (repr(shown), repr(gateway), repr(condor)):
        assert "hunter2" not in text and TOKEN not in text
    assert shown[0]["username"] == "anne" and "****" in shown[0]["password"]
    assert HTCDaskCondorCredentials.load("hidden").token.get_secret_value() == TOKEN, "without the blanks around it"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: HTCDaskGatewayCredentials(username="anne"), ["neither password nor token"]),
        (lambda: HTCDaskGatewayCredentials(password="", token=""), ["neither password nor token"]),
        (lambda: HTCDaskGatewayCredentials(password="hunter2", token="s3cr3t"), ["both given", "leave one"]),
        (lambda: HTCDaskCondorCredentials(token="/home/anne/hunter2"), ["no IDTOKEN", "condor_token_create"]),
        (lambda: HTCDaskCondorCredentials(token="hunter2.s3cr3t"), ["no IDTOKEN"]),
        (lambda: HTCDaskCondorCredentials(token="hunter2.s3cr3t.a b"), ["no IDTOKEN"]),
        (lambda: HTCDaskCondorCredentials(token=""), ["no IDTOKEN"]),
    ],
)
def test_what_no_block_can_be_is_said_without_the_secret(make: Callable[[], Block], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "hunter2" not in text and "s3cr3t" not in text


@pytest.mark.parametrize(
    ("group", "other", "value"),
    [("gateway", "password", "hunter2"), ("gateway", "token", "hunter2"), ("condor", "token_file", "/no/file")],
)
@pytest.mark.parametrize("way", ["argument", "environment"])
def test_a_secret_given_twice_is_an_error_that_names_both(
    group: str, other: str, value: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"credentials_block": "mine", other: value}
    variables = {f"PREFECT_INTEGRATIONS_HTCDASK_{group}_{name}".upper(): one for name, one in fields.items()}
    if way == "environment":
        for name, one in variables.items():
            monkeypatch.setenv(name, one)
    with pytest.raises(SettingsError) as caught:
        load_settings(**({group: fields} if way == "argument" else {}))
    text = str(caught.value)
    assert all(word in text for word in (*variables, f"{group}.{other}", "'mine'", "leave one")), text
    assert "hunter2" not in text and "\n" not in text


def settings_of(tmp_path: Path, **groups: dict[str, Any]) -> HTCDaskSettings:
    """Settings with a gateway, and an embedded pool that may be started, should it come to that."""
    return load_settings(
        gateway={"address": "http://127.0.0.1:9", **groups.get("gateway", {})},
        condor=groups.get("condor"),
        embedded={"directory": str(tmp_path / "embedded"), "use_configured_pool": False},
    )


@pytest.mark.parametrize(("group", "kind"), [("gateway", BLOCKS[0]), ("condor", BLOCKS[1])])
def test_a_missing_block_is_one_clear_error_before_anything_starts(
    group: str, kind: type[Block], prefect_api: PrefectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONDOR_CONFIG", "ONLY_ENV")
    settings = settings_of(tmp_path, **{group: {"credentials_block": "no-such"}})
    with pytest.raises(SettingsError) as caught:
        resolve_endpoints(settings)
    text = str(caught.value)
    variable = f"PREFECT_INTEGRATIONS_HTCDASK_{group.upper()}_CREDENTIALS_BLOCK"
    words = [f"{group}.credentials_block = 'no-such'", variable, prefect_api.url, kind.__name__, "block register"]
    assert all(word in text for word in words), text
    assert find(settings.embedded) is None, "the embedded pool was started"


def test_an_api_that_does_not_answer_is_one_clear_error(prefect_api: PrefectServer, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/api"
    with temporary_settings({PREFECT_API_URL: url}), pytest.raises(SettingsError) as caught:
        resolve_endpoints(settings_of(tmp_path, gateway={"credentials_block": "mine"}))
    text = str(caught.value)
    assert all(word in text for word in ("gateway.credentials_block = 'mine'", url, "PREFECT_API_URL")), text


async def test_a_block_is_fetched_inside_an_event_loop_too(prefect_api: PrefectServer) -> None:
    await HTCDaskGatewayCredentials(username="anne", token="t0k").asave("looped", overwrite=True)
    login = gateway_login(load_settings(gateway={"credentials_block": "looped"}).gateway)
    assert login.token is not None and login.password is None
    assert (login.username, login.token.get_secret_value()) == ("anne", "t0k")


def test_a_user_name_of_the_settings_comes_before_the_block_s(prefect_api: PrefectServer) -> None:
    HTCDaskGatewayCredentials(username="anne", password="p").save("shared", overwrite=True)
    of_block = gateway_login(load_settings(gateway={"credentials_block": "shared"}).gateway)
    of_settings = gateway_login(load_settings(gateway={"credentials_block": "shared", "username": "bo"}).gateway)
    assert (of_block.username, of_settings.username) == ("anne", "bo")


def test_a_token_goes_from_the_block_to_the_schedd_s_access_alone(prefect_api: PrefectServer, tmp_path: Path) -> None:
    HTCDaskCondorCredentials(token=TOKEN).save("pool", overwrite=True)
    settings = load_settings(
        gateway={"address": "http://g"}, condor={"collector": "pool:9618", "credentials_block": "pool"}
    )
    parts = resolve_endpoints(settings)
    assert parts.schedd.token == TOKEN == condor_token(settings.condor)
    assert TOKEN not in repr(parts) + repr(settings) + repr(settings.stated())


@pytest.fixture
def gateway_of_a_site(
    condor_environment: EmbeddedEndpoint, prefect_api: PrefectServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[EmbeddedEndpoint]:
    """The session's gateway and pool, given as a site's are: by their addresses, without a login."""
    prefix = "PREFECT_INTEGRATIONS_HTCDASK"
    monkeypatch.setenv(f"{prefix}_GATEWAY_ADDRESS", condor_environment.gateway_address)
    monkeypatch.setenv(f"{prefix}_GATEWAY_PROXY_ADDRESS", condor_environment.proxy_address)
    monkeypatch.setenv(f"{prefix}_GATEWAY_USERNAME", condor_environment.username)
    monkeypatch.setenv(f"{prefix}_CONDOR_CONFIG_FILE", str(condor_environment.condor_config))
    monkeypatch.setenv(f"{prefix}_EMBEDDED_ENABLED", "false")
    yield condor_environment
    assert "password" not in " ".join(os.environ).lower()


@pytest.mark.pool
def test_a_real_gateway_lets_the_block_s_password_in_and_no_other(gateway_of_a_site: EmbeddedEndpoint) -> None:
    HTCDaskGatewayCredentials(password=gateway_of_a_site.password).save("site", overwrite=True)
    HTCDaskGatewayCredentials(password="not it").save("wrong", overwrite=True)
    with pytest.raises(GatewayUnreachable, match=r"gateway\.credentials_block"):
        HTCGatewayCluster(settings=load_settings(gateway={"credentials_block": "wrong"}), **SMALL)
    with HTCGatewayCluster(settings=load_settings(gateway={"credentials_block": "site"}), **SMALL) as cluster:
        cluster.scale(1)
        with cluster.get_client(set_as_default=False) as client:
            assert client.submit(sum, [1, 2]).result(timeout=60) == 3
