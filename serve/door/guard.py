"""The door: an ASGI application around another one, which sees only what may come in.

It is plain ASGI, without a framework, so that nothing stands between a job and the end of its connection.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from ..jobs.job import ANYONE
from . import access as rules
from .access import Access, Head, Refusal, is_preflight, read_head
from .body import BODY_LIMITS, Body, BodyLimits, Clock, Message, Receive, refuse_claim
from .cors import Headers, preflight_answer, readable_by

KEY_ID = "latentrt.key_id"  # where the scope says whose request it is

Scope = dict[str, Any]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
BodyOf = Callable[[str, Refusal], bytes]

_LOG = logging.getLogger(__name__)


def refusal_as_json(path: str, refusal: Refusal) -> bytes:
    """A refusal in the form that clients of OpenAI's API read. `path` is for other forms on other routes."""
    message = f"{refusal.found}; expected {refusal.expected}. {refusal.fix}"
    kind = "authentication_error" if refusal.status == 401 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": refusal.code}
    return json.dumps({"error": error}).encode()


class Guard:
    """Lets in who may call.

    Args:
        application: what is guarded. Its scope has the caller's key id under `KEY_ID`, and the path of an
            absolute target.
        access: who may call.
        limits: of a body.
        now: seconds of a clock that never goes back.
        refusal_body: the JSON of a refusal, by the path.
    """

    def __init__(
        self,
        application: Application,
        access: Access,
        *,
        limits: BodyLimits = BODY_LIMITS,
        now: Clock = time.monotonic,
        refusal_body: BodyOf = refusal_as_json,
    ) -> None:
        self._application = application
        self._access = access
        self._limits = limits
        self._now = now
        self._refusal_body = refusal_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection, as ASGI hands it over."""
        if scope["type"] == "http":
            await self._request(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._application(scope, receive, send)
        elif scope["type"] == "websocket":  # there are none here; before it is accepted this is an answer 403
            await receive()
            await send({"type": "websocket.close", "code": 1008})

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: Headers = scope["headers"]
        head = read_head(scope, headers, self._access.keys)
        listed = head.listed_origin(self._access)
        answer = _Answer(scope, send, readable_by(listed) if self._access.origins else [])
        if refusal := rules.refuse(head, self._access) or refuse_claim(head, self._limits):
            _LOG.info(
                "refused %s %.200r of host %.200r: %s", head.method, head.path, head.hosts, refusal.code
            )
            await self._answer(answer, head, refusal)
        elif listed and is_preflight(head, self._access):
            await answer.whole(204, preflight_answer(headers), b"")
        else:
            inner = {**scope, "path": head.path, KEY_ID: head.key_id or ANYONE}
            if head.path != scope["path"]:
                inner["raw_path"] = None
            await self._guarded(inner, receive, answer, head)

    async def _guarded(self, scope: Scope, receive: Receive, answer: _Answer, head: Head) -> None:
        body = Body(receive, self._limits, self._now)
        try:
            await self._application(scope, body.receive, lambda message: answer.send(message, body.refusal))
        except Exception:
            if body.refusal is None or answer.started:
                raise
        if body.refusal and not answer.started:
            await self._answer(answer, head, body.refusal)

    async def _answer(self, answer: _Answer, head: Head, refusal: Refusal) -> None:
        content = self._refusal_body(head.path, refusal) if refusal.found else b""
        headers: Headers = [(b"content-type", b"application/json")] if content else []
        if refusal.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))  # Basic would open the browser's own dialog
        elif refusal.status != 408:
            headers.append((b"x-should-retry", b"false"))
        await answer.whole(refusal.status, headers, b"" if head.method == "HEAD" else content, close=True)


class _Answer:
    """The way back: adds headers to an answer's start, and knows whether there was one."""

    def __init__(self, scope: Scope, send: Send, added: Iterable[tuple[bytes, bytes]]) -> None:
        self.started = False
        self.added = list(added)
        self._send = send
        # the rest of a refused body is not read, so the connection cannot serve another request
        self._may_close = str(scope.get("http_version", "1.1")).startswith("1")

    async def send(self, message: Message, refusal: Refusal | None) -> None:
        """Hand a message of the application on; what it makes of a refused body is not sent."""
        if refusal and not self.started:
            return
        if message["type"] == "http.response.start":
            self.started = True
            message = {**message, "headers": [*message.get("headers", ()), *self.added]}
        await self._send(message)

    async def whole(self, status: int, headers: Headers, content: bytes, *, close: bool = False) -> None:
        """An answer of the guard's own."""
        own: Headers = [(b"content-length", str(len(content)).encode()), *headers, *self.added]
        if status == 204:
            own = own[1:]
        if close and self._may_close:
            own.append((b"connection", b"close"))
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": own})
        await self._send({"type": "http.response.body", "body": content})
