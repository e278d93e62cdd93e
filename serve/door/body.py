"""Counts a request's body while it streams in, and gives it a time: servers limit neither."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from .access import Head, Refusal

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class BodyLimits:
    """How much a request may send, and in what time.

    Attributes:
        size: bytes.
        seconds: from the head's arrival to the last byte.
    """

    size: int = 32 * 2**20
    seconds: float = 30.0


BODY_LIMITS = BodyLimits()


class BodyRefusedError(Exception):
    """A body that is too large or too slow. For the guard alone, which answers."""


class Body:
    """An ASGI `receive` that refuses: too much, or too late.

    What stands in Content-Length is a claim; the bytes are counted in any case. A refusal stays in `refusal`,
    because what lies between may take the error for its own.
    """

    def __init__(self, receive: Receive, limits: BodyLimits, now: Clock) -> None:
        self.refusal: Refusal | None = None
        self._receive = receive
        self._limits = limits
        self._now = now
        self._deadline = now() + limits.seconds
        self._size = 0
        self._whole = False

    async def receive(self) -> Message:
        """The next message.

        Raises:
            BodyRefusedError: `refusal` says why.
        """
        if self._whole:  # then comes nothing but the end of the connection, however long that takes
            return await self._receive()
        if self.refusal:
            raise BodyRefusedError(self.refusal.code)
        message = await self._in_time()
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            if self._size > self._limits.size:
                raise self._refused(too_large(self._limits))
            self._whole = not message.get("more_body", False)
        else:
            self._whole = True  # the client is gone
        return message

    async def _in_time(self) -> Message:
        left = self._deadline - self._now()
        try:
            if left > 0:
                return await asyncio.wait_for(self._receive(), left)
        except asyncio.TimeoutError:
            pass
        raise self._refused(
            Refusal(
                status=408,
                code="body_timeout",
                found=f"the body was not complete after {self._limits.seconds:g} s",
                expected="a whole request in that time",
                fix="Send less, or over a faster connection.",
            )
        )

    def _refused(self, refusal: Refusal) -> BodyRefusedError:
        self.refusal = refusal
        return BodyRefusedError(refusal.code)


def refuse_claim(head: Head, limits: BodyLimits) -> Refusal | None:
    """What Content-Length alone makes hopeless, before a byte of the body is read."""
    if not head.lengths:
        return None
    if len(set(head.lengths)) > 1 or not re.fullmatch("[0-9]{1,19}", head.lengths[0]):
        return Refusal(
            status=400,
            code="content_length",
            found="Content-Length is no number, or several",
            expected="the body's length in bytes",
            fix="Leave it to the HTTP client.",
        )
    if head.encoded:  # a proxy may believe the other, and take the rest for a request (RFC 9112, 6.3)
        return Refusal(
            status=400,
            code="content_length",
            found="a body with Content-Length and Transfer-Encoding",
            expected="one of them",
            fix="Leave it to the HTTP client.",
        )
    return too_large(limits) if int(head.lengths[0]) > limits.size else None


def too_large(limits: BodyLimits) -> Refusal:
    """The refusal of a body that has, or claims, too many bytes."""
    return Refusal(
        status=413,
        code="body_too_large",
        found="the body is too large",
        expected=f"at most {limits.size} bytes",
        fix="Send fewer or smaller pictures.",
    )
