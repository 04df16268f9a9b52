"""Clients of the Prefect API on a connection that the server closes under them."""

from __future__ import annotations

import asyncio
import contextvars
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest
from prefect import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from prefect_htcdask.runner.ui.artifacts import Artifacts
from prefect_htcdask.utils.prefect_client import open_async_client, open_client, prefect_api
from tests.support.artifacts import artifacts_of, message
from tests.support.waiting import wait_until

SERVER_KEEPS = 5.0
"""Seconds for which uvicorn keeps an idle connection (``timeout_keep_alive``)."""

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


class Fickle:
    """A server that answers one request of each connection, and closes it at the next; a real one does so seldom.

    Attributes:
        requests: of each connection, how many requests came.
    """

    def __init__(self, answers: int = 1) -> None:
        self.requests: list[int] = []
        self._answers = answers
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/api"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self.requests.append(0)
                threading.Thread(target=self._answer, args=(connection, len(self.requests) - 1), daemon=True).start()

    def _answer(self, connection: socket.socket, number: int) -> None:
        with connection, suppress(OSError):
            data = b""
            while chunk := connection.recv(65536):
                data += chunk
                if b"\r\n\r\n" not in data:
                    continue
                data = b""
                self.requests[number] += 1
                if self.requests[number] > self._answers:
                    return
                connection.sendall(ANSWER)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def fickle() -> Iterator[Fickle]:
    server = Fickle()
    with temporary_settings({PREFECT_API_URL: server.url}):
        yield server
    server.close()


def test_a_request_that_fails_on_a_kept_connection_is_sent_again_at_once(fickle: Fickle) -> None:
    with open_client() as client:
        # Prefect's own client tries nothing again here.
        for _ in range(5):
            assert client.request("GET", "/health").json() == {}
            assert client.request("GET", "/hello").json() == {}
    # Each was sent again once, on a new connection.
    assert fickle.requests == [2] * 9 + [1]


def test_so_do_commands_and_hooks(fickle: Fickle) -> None:
    with prefect_api() as client:
        for _ in range(3):
            assert client.request("GET", "/health").json() == {}
    assert fickle.requests == [2, 2, 1]


def test_what_fails_on_a_new_connection_is_told() -> None:
    server = Fickle(answers=0)
    with temporary_settings({PREFECT_API_URL: server.url}), open_client() as client:
        with pytest.raises(httpx.RemoteProtocolError):
            client.request("GET", "/health")
        assert server.requests == [1]
        server.close()
        with pytest.raises(httpx.TransportError):
            client.request("GET", "/health")


@pytest.mark.usefixtures("prefect_api")
def test_a_client_that_was_idle_for_as_long_as_the_server_waits_is_answered() -> None:
    def ask(pause: float) -> str:
        with open_client() as client:
            client.hello()
            time.sleep(pause)
            try:
                client.hello()
            except httpx.HTTPError as exc:
                return f"{pause:.4f} s: {exc!r}"
        return ""

    async def ask_async(pause: float) -> str:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
            async with open_async_client() as client:
                await client.hello()
                await asyncio.sleep(pause)
                try:
                    await client.hello()
                except httpx.HTTPError as exc:
                    return f"{pause:.4f} s, async: {exc!r}"
        return ""

    pauses = [SERVER_KEEPS + (number - 30) / 1000 for number in range(60)]
    with ThreadPoolExecutor(len(pauses)) as pool:
        failed = [told for told in pool.map(ask, pauses) if told]
    assert failed == []
    with ThreadPoolExecutor(8) as pool:
        assert [told for told in pool.map(lambda pause: asyncio.run(ask_async(pause)), pauses[26:34]) if told] == []


def test_a_client_within_a_flow_is_not_the_engine_s(prefect_api: Any) -> None:
    with get_client(sync_client=True) as engine, open_client() as client:
        assert client is not engine


def test_artifacts_that_change_as_often_as_the_server_waits_are_written_without_a_word(
    prefect_api: Any, flow_run_id: Any
) -> None:
    log: list[str] = []
    context = contextvars.copy_context()
    several = [
        Artifacts(
            flow_run_id,
            f"often-{number}",
            None,
            SERVER_KEEPS + (number - 5) / 500,
            lambda summary: "",
            context,
            lambda level, text: log.append(text),
        )
        for number in range(10)
    ]
    for done in range(1, 4):
        for one in several:
            one.take(message(done * 1000))
        wait_until(
            lambda done=done: len([1 for one in artifacts_of(flow_run_id).values() if one["data"] == done * 10]) == 10,
            60,
            "the latest of all",
        )
    for one in several:
        one.finish({})
        one.close()
    assert log == []
