"""A web proxy in the environment: by way of it goes what is meant to, and nothing that `no_proxy` excepts."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import dask
import pytest
from aiohttp import web
from dask_gateway.auth import BasicAuth

from prefect_htcdask.gateway.checks import GatewayUnreachable, ask_for_options
from prefect_htcdask.gateway.finalizers import PrivateGateway
from prefect_htcdask.supervisor.protocol import GatewayAccess
from prefect_htcdask.supervisor.rpc import GatewayLink
from prefect_htcdask.utils.prefect_client import PrefectAPIError, prefect_api
from prefect_htcdask.utils.web_proxies import WebProxy, environment_proxy

GATEWAY = "http://gateway.example:8000"
URL = "http://web:3128"
WEB = WebProxy(URL, "http_proxy")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@asynccontextmanager
async def server(status: int = 200) -> AsyncIterator[tuple[str, list[str]]]:
    """A gateway, or a proxy that answers in its place; its address, and the hosts and paths that it was asked for."""
    asked: list[str] = []

    async def answer(request: web.BaseRequest) -> web.Response:
        asked.append(f"{request.url.host}{request.rel_url.path}")
        return web.json_response({"cluster_options": [], "error": "so it is"}, status=status)

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"127.0.0.1:{runner.addresses[0][1]}", asked
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("address", "environment", "proxy"),
    [
        (GATEWAY, {}, None),
        (GATEWAY, {"http_proxy": URL}, WEB),
        (GATEWAY, {"HTTP_PROXY": URL}, WebProxy(URL, "HTTP_PROXY")),
        (GATEWAY, {"HTTP_PROXY": "http://no:1", "http_proxy": URL}, WEB),
        (GATEWAY, {"http_proxy": "http://anne:secret@web:3128"}, WEB),
        (GATEWAY, {"https_proxy": URL}, None),
        ("https://gateway.example", {"https_proxy": URL}, WebProxy(URL, "https_proxy")),
        (GATEWAY, {"http_proxy": URL, "no_proxy": "gateway.example"}, None),
        (GATEWAY, {"http_proxy": URL, "NO_PROXY": "x.org, .example"}, None),
        (GATEWAY, {"http_proxy": URL, "no_proxy": "example"}, None),
        (GATEWAY, {"http_proxy": URL, "no_proxy": "gateway.example:8000"}, None),
        (GATEWAY, {"http_proxy": URL, "no_proxy": "*"}, None),
        (GATEWAY, {"http_proxy": URL, "no_proxy": "other.example"}, WEB),
        ("http://10.1.2.3:8000", {"http_proxy": URL, "no_proxy": "10.0.0.0/8"}, None),
        ("http://11.1.2.3:8000", {"http_proxy": URL, "no_proxy": "10.0.0.0/8"}, WEB),
        ("http://127.0.0.1:8000", {"http_proxy": URL}, None),
        ("http://localhost:8000", {"http_proxy": URL}, None),
        ("http://[::1]:8000", {"HTTP_PROXY": URL}, None),
    ],
)  # fmt: skip
def test_which_proxy(
    address: str, environment: dict[str, str], proxy: WebProxy | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert environment_proxy(address) == proxy


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


async def ask(address: str) -> None:
    async with PrivateGateway(address, auth=BasicAuth("anne", "pw"), asynchronous=True) as gateway:
        await ask_for_options(gateway)


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "https_proxy"])
async def test_a_gateway_on_loopback_is_asked_directly(
    name: str, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a proxy that does not even answer; by the flow's process and by the supervisor."""
    monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port}")
    async with server() as (address, asked):
        await ask(f"http://{address}")
        access = GatewayAccess(f"http://{address}", address, "", BasicAuth("anne", "pw"), "c1", "", "", "")
        assert await GatewayLink(access).stop()
    assert len(asked) == 2


async def test_what_is_not_excepted_goes_by_way_of_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    async with server() as (proxy, asked):
        monkeypatch.setenv("http_proxy", f"http://{proxy}")
        await ask(GATEWAY)
        assert asked == ["gateway.example/api/v1/options"]


async def test_what_no_proxy_excepts_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    async with server() as (proxy, asked):
        monkeypatch.setenv("http_proxy", f"http://{proxy}")
        monkeypatch.setenv("no_proxy", ".example")
        with pytest.raises(GatewayUnreachable, match=rf"{GATEWAY}' cannot be reached") as caught:
            await ask(GATEWAY)
        assert "proxy" not in str(caught.value) and asked == []


async def test_a_proxy_of_dask_s_configuration_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    async with server() as (proxy, asked):
        with dask.config.set({"gateway.http-client.proxy": f"http://{proxy}"}):
            await ask(GATEWAY)
    assert asked == ["gateway.example/api/v1/options"]


async def test_an_error_by_way_of_a_proxy_names_it(closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://anne:secret@127.0.0.1:{closed_port}")
    words = (
        rf"the gateway at gateway\.address = '{GATEWAY}', by way of the proxy http://127\.0\.0\.1:{closed_port} of "
        r"HTTP_PROXY, cannot be reached: .*; if it is to be asked directly, add its host to no_proxy"
    )
    with pytest.raises(GatewayUnreachable, match=words) as caught:
        await ask(GATEWAY)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("status", [403, 404, 503])
async def test_so_does_an_answer_that_may_be_the_proxy_s_own(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async with server(status) as (proxy, _):
        monkeypatch.setenv("http_proxy", f"http://{proxy}")
        with pytest.raises(GatewayUnreachable, match=rf"by way of the proxy http://{proxy} of http_proxy.*no_proxy"):
            await ask(GATEWAY)


async def test_a_proxy_that_refuses_a_tunnel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async with server(403) as (proxy, _):
        monkeypatch.setenv("https_proxy", f"http://{proxy}")
        with pytest.raises(GatewayUnreachable, match=rf"the proxy http://{proxy} of https_proxy.*the proxy says 403"):
            await ask("https://gateway.example")


def test_the_prefect_api_s_errors_name_it_too(
    closed_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Prefect's own client takes the proxy for loopback too, unless it is told otherwise."""
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed_port}")
    words = rf"by way of the proxy http://127\.0\.0\.1:{closed_port} of http_proxy.*add its host to no_proxy"
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api", PREFECT_CLIENT_MAX_RETRIES: 0}),
        pytest.raises(PrefectAPIError, match=words),
        prefect_api() as client,
    ):
        client.hello()
