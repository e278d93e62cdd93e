"""What a browser asks, and wants to hear, before a page of another origin may call. Only listed ones may.

There is no `Access-Control-Allow-Credentials`: a page sends its key in a header of its own making, and
nothing that the browser would add by itself is believed here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

METHODS = "GET, POST, PUT, PATCH, DELETE"
EXPOSED = "location, retry-after, x-request-id, x-should-retry"
REMEMBERED_SECONDS = 600
LONGEST_HEADER_LIST = 1024  # characters

_NAMES = re.compile(r"[A-Za-z0-9-]+(?: *, *[A-Za-z0-9-]+)*")

Headers = list[tuple[bytes, bytes]]

_VARIES = (b"vary", b"Origin")


def readable_by(origin: str | None) -> Headers:
    """What lets a page of this origin read the answer; for None what keeps caches from giving it that one."""
    if origin is None:
        return [_VARIES]
    return [
        _VARIES,
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-expose-headers", EXPOSED.encode()),
    ]


def preflight_answer(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """What such a page may send, beside `readable_by`: the headers it asks for: each client has its own."""
    asked = b",".join(value for name, value in headers if name.lower() == b"access-control-request-headers")
    names = asked.decode("latin-1").strip()
    allowed = names if len(names) <= LONGEST_HEADER_LIST and _NAMES.fullmatch(names) else ""
    answer = [
        (b"access-control-allow-methods", METHODS.encode()),
        (b"access-control-max-age", str(REMEMBERED_SECONDS).encode()),
    ]
    return [*answer, (b"access-control-allow-headers", allowed.encode())] if allowed else answer
