"""Calls an ASGI application by hand, in a loop whose clock jumps to what is next to do instead of waiting."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]


class _Impatient(selectors.DefaultSelector):
    """Nothing is waited for: where only time would help, time has passed."""

    passed = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "waits for ever"
        self.passed += timeout
        return super().select(0)


class JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.selector = _Impatient()
        super().__init__(self.selector)

    def time(self) -> float:
        return self.selector.passed


def run(make: Callable[[JumpingLoop], Coroutine[Any, Any, Any]]) -> Any:
    loop = JumpingLoop()
    try:
        return loop.run_until_complete(make(loop))
    finally:
        loop.close()


@dataclass
class Client:
    """What a client sends, and what it saw. `gaps`: seconds before each chunk of the body."""

    chunks: Iterable[bytes] = (b"",)
    gaps: Iterator[float] | None = None
    read: int = 0  # messages that were taken
    sent: list[Message] = field(default_factory=list[Message])
    _pending: Iterator[Message] | None = None

    async def receive(self) -> Message:
        if self._pending is None:
            self._pending = self._messages()
        if self.gaps is not None and (gap := next(self.gaps, 0.0)):
            await asyncio.sleep(gap)
        self.read += 1
        return next(self._pending, {"type": "http.disconnect"})

    def _messages(self) -> Iterator[Message]:
        chunks = iter(self.chunks)
        chunk = next(chunks, b"")
        for following in chunks:
            yield {"type": "http.request", "body": chunk, "more_body": True}
            chunk = following
        yield {"type": "http.request", "body": chunk, "more_body": False}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        starts = [message["status"] for message in self.sent if message["type"] == "http.response.start"]
        assert len(starts) == 1, self.sent
        return int(starts[0])

    @property
    def headers(self) -> dict[str, str]:
        pairs = self.sent[0]["headers"]
        return {name.decode(): value.decode() for name, value in pairs}

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.sent[1:])


def scope_of(
    method: str = "POST", path: str = "/v1/jobs", headers: Iterable[tuple[str, str]] = ()
) -> Message:
    return {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers],
    }


@dataclass
class Inside:
    """An application that reads the whole body, and answers with its length and whose it was."""

    scopes: list[Message] = field(default_factory=list[Message])
    bodies: list[int] = field(default_factory=list[int])

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        self.scopes.append(scope)
        size = 0
        while True:
            message = await receive()
            size += len(message.get("body", b""))
            if not message.get("more_body"):
                break
        self.bodies.append(size)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-inside", b"1")]})
        await send({"type": "http.response.body", "body": str(size).encode()})
