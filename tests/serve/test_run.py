"""The server on a socket: what listens, and what uvicorn is told."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import pytest

from latentrt import UsageError
from latentrt.serve import run
from latentrt.serve.run import listen
from tests.serve.live import Live, live, open_demo


def test_an_answer_does_not_wait_for_the_client_to_confirm_its_head() -> None:
    """Nagle's algorithm is off on what asyncio accepts; with it each answer took 40 ms more."""

    async def accepted() -> Any:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def met(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            own = writer.get_extra_info("socket")
            found.set_result(own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listening = listen("127.0.0.1", 0)
        async with await asyncio.start_server(met, sock=listening):
            _, writer = await asyncio.open_connection(*listening.getsockname())
            answer = await asyncio.wait_for(found, 60)
            writer.close()
            return answer

    assert asyncio.run(accepted()) != 0


def test_addresses_of_others_are_not_listened_on() -> None:
    with pytest.raises(UsageError, match=r"203\.0\.113\.1:7860 cannot be listened on"):
        listen("203.0.113.1", 7860)


def until_answered(at: Live, status: int) -> None:
    """Connections come and go a moment later."""
    end = time.monotonic() + 60
    while at.client.get("/health/live").status_code != status:
        assert time.monotonic() < end


def test_connections_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_CONNECTIONS", 4)
    with open_demo() as pipe, live(pipe, start=False) as at:
        assert at.client.get("/health/live").status_code == 200
        address = at.url.removeprefix("http://").split(":")
        idle = [socket.create_connection((address[0], int(address[1]))) for _ in range(4)]
        until_answered(at, 503)
        for one in idle:
            one.close()
        until_answered(at, 200)
