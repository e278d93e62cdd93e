"""Decides from a request's head whether it may come in: a row of checks, each of which may say no.

What they hold off: a foreign page in a browser on this machine. It can send requests here (forms, and without
a key), and with a name that its owner points to 127.0.0.1 it is even of the same origin (DNS rebinding); only
the Host tells. A program that is no browser may write any head: against those there are keys.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ...engines.errors import UsageError
from .keys import NO_KEYS, Keys
from .links import LINKS

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
HEALTH_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"})
FORM_TYPES = frozenset({"application/x-www-form-urlencoded", "multipart/form-data", "text/plain"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?")
_ABSOLUTE = re.compile(r"https?://([^/?#]*)(/.*)?", re.IGNORECASE | re.DOTALL)
_NO_HOST = "?"  # the authority of a target that names no host we could know
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#,]+")


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may call. Made by `allow`, which checks the names.

    Attributes:
        hosts: what a Host header may name, whatever its port: lower case, IPv6 in brackets.
        origins: pages of other origins that may call, each `scheme://host[:port]`.
        keys: without any, everyone whom the other checks let in may call.
        open_paths: need no key.
    """

    hosts: frozenset[str] = LOOPBACK_HOSTS
    origins: frozenset[str] = frozenset()
    keys: Keys = NO_KEYS
    open_paths: frozenset[str] = HEALTH_PATHS


@dataclass(frozen=True, kw_only=True)
class Head:
    """What the checks look at. Headers are lists: a request may repeat one, and readers then disagree.

    Attributes:
        path: as the routes see it; of an absolute target the part behind its authority.
        authority: that of an absolute target; "" where the target is a path.
        encoded: whether there is a Transfer-Encoding, which says by itself where a body ends.
        key_id: of the key that was sent; None without one, or where it is none of ours.
    """

    method: str
    path: str
    authority: str
    hosts: tuple[str, ...]
    origins: tuple[str, ...]
    fetch_site: str
    fetch_mode: str
    content_types: tuple[str, ...]
    lengths: tuple[str, ...]
    encoded: bool
    key_id: str | None

    @property
    def own_origin(self) -> bool:
        """Whether the page that calls came from here, or no page does. (A proxy may speak https for us.)"""
        own = {f"{scheme}://{host}" for scheme in ("http", "https") for host in self.hosts}
        return not self.origins or (len(self.origins) == 1 and self.origins[0].lower() in own)

    def listed_origin(self, access: Access) -> str | None:
        """The origin of the page that calls, if it is one of those that may."""
        listed = len(self.origins) == 1 and self.origins[0] in access.origins
        return self.origins[0] if listed else None


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a request does not come in. A refusal without `found` is answered with an empty body."""

    status: int
    code: str
    found: str = ""
    expected: str = ""
    fix: str = ""


Check = Callable[[Head, Access], "Refusal | None"]


def allow(
    *,
    hosts: Iterable[str] = (),
    origins: Iterable[str] = (),
    keys: Keys = NO_KEYS,
    open_paths: Iterable[str] = HEALTH_PATHS,
) -> Access:
    """Who may call, beside what this machine itself names localhost, 127.0.0.1 and [::1].

    Raises:
        UsageError: a host with a scheme, port or wildcard, or an origin that no browser would send.
    """
    pages = frozenset(origins)
    for origin in pages:
        if not _ORIGIN.fullmatch(origin) or origin != origin.lower() or "*" in origin:
            raise UsageError(
                f"the allowed origin {origin!r}",
                expected="scheme://host or scheme://host:port in lower case, as browsers send it",
                fix="Copy the address of the page up to its path; there are no wildcards.",
            )
    names = frozenset(map(_host_name, hosts))
    return Access(
        hosts=LOOPBACK_HOSTS | names,
        origins=pages,
        keys=keys,
        open_paths=frozenset(open_paths),
    )


def check_exposure(host: str, keys: Keys) -> None:
    """Refuse to listen where other machines can call, unless they need a key.

    Args:
        host: the address to listen on. A name other than localhost may be any machine's.
        keys: those that callers need.

    Raises:
        UsageError: another address than a loopback one, and no key.
    """
    if not keys and not _is_loopback(host):
        raise UsageError(
            f"the server would listen on {host or 'every address'!r} without a key, for all who reach it",
            expected="a key, or an address of this machine alone: 127.0.0.1, ::1, localhost",
            fix="Put a key into a file and name it, --key-file FILE, or listen on --host 127.0.0.1",
        )


def read_head(scope: dict[str, object], headers: Iterable[tuple[bytes, bytes]], keys: Keys) -> Head:
    """The parts of an ASGI scope that the checks look at."""
    found: dict[str, list[str]] = {}
    for name, value in headers:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1").strip(" \t"))
    method, path = str(scope["method"]).upper(), str(scope["path"])
    authority = ""
    if absolute := _ABSOLUTE.fullmatch(path):  # some servers hand an absolute target on as it is
        authority, path = absolute[1] or _NO_HOST, absolute[2] or "/"
    elif not path.startswith("/") and (method, path) != ("OPTIONS", "*"):
        authority = _NO_HOST
    return Head(
        method=method,
        path=path,
        authority=authority,
        hosts=tuple(host.lower() for host in found.get("host", ())),
        origins=tuple(found.get("origin", ())),
        fetch_site=",".join(found.get("sec-fetch-site", ())).lower(),
        fetch_mode=",".join(found.get("sec-fetch-mode", ())).lower(),
        content_types=tuple(
            value.partition(";")[0].strip().lower() for value in found.get("content-type", ())
        ),
        lengths=tuple(found.get("content-length", ())),
        encoded="transfer-encoding" in found,
        key_id=keys.owner(_sent_key(found)) if keys else None,
    )


def refuse_host(head: Head, access: Access) -> Refusal | None:
    """Let in who calls this server by a name of its own, on every method and path."""
    named = [*head.hosts, *([head.authority.lower()] if head.authority else [])]
    own = len(head.hosts) == 1 and all(_without_port(name) in access.hosts for name in named)
    return None if own else Refusal(status=421, code="foreign_host")


def refuse_site(head: Head, access: Access) -> Refusal | None:
    """Hold off what a page of another site had its browser send, with or without an Origin."""
    foreign = "cross-site" in head.fetch_site and not head.listed_origin(access)
    open_to_all = is_link(head) or is_visit(head)
    return Refusal(status=403, code="cross_site") if foreign and not open_to_all else None


def refuse_origin(head: Head, access: Access) -> Refusal | None:
    """Hold off pages of other origins, but for the listed ones; sandboxed ones have the origin "null"."""
    known = head.own_origin or head.listed_origin(access)
    return None if known else Refusal(status=403, code="foreign_origin")


def refuse_key(head: Head, access: Access) -> Refusal | None:
    """Where there are keys, ask for one: not on open paths, nor of a browser that asks what it may send."""
    if not access.keys or head.key_id or head.path in access.open_paths or is_link(head):
        return None
    if is_preflight(head, access):
        return None
    return Refusal(
        status=401,
        code="invalid_api_key",
        found="no key, or one that is not known here",
        expected="Authorization: Bearer KEY, x-api-key: KEY, or Basic with the key as password",
        fix="Send a key that the server was started with.",
    )


def refuse_form(head: Head, access: Access) -> Refusal | None:
    """Hold off what a form of a foreign page can send without being asked for leave."""
    form = not FORM_TYPES.isdisjoint(head.content_types) and head.method not in SAFE_METHODS
    if not form or head.own_origin or head.key_id:
        return None
    return Refusal(status=403, code="foreign_form")


CHECKS: tuple[Check, ...] = (refuse_host, refuse_site, refuse_origin, refuse_key, refuse_form)


def refuse(head: Head, access: Access) -> Refusal | None:
    """The first check's refusal; None lets the request in."""
    return next((no for check in CHECKS if (no := check(head, access))), None)


def is_link(head: Head) -> bool:
    """Whether a picture's link is followed: it takes the place of a key, and any page may show it."""
    return head.method == "GET" and head.path.startswith(LINKS)


def is_visit(head: Head) -> bool:
    """Whether a person follows a link to the page, from wherever: what the page asks for, it asks itself."""
    return (head.method, head.path, head.fetch_mode) == ("GET", "/", "navigate")


def is_preflight(head: Head, access: Access) -> bool:
    """Whether a browser asks for a listed page what it may send; it then sends no key."""
    return head.method == "OPTIONS" and head.listed_origin(access) is not None


def _sent_key(headers: dict[str, list[str]]) -> bytes | None:
    """The key of a request, as bytes. `x-api-key` comes first: a proxy may need Authorization for itself."""
    sent = headers.get("x-api-key") or headers.get("authorization") or []
    if len(sent) != 1:
        return None
    if "x-api-key" in headers:
        return sent[0].encode("latin-1")
    scheme, _, value = sent[0].partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1")
    return _password(value.strip()) if scheme.lower() == "basic" else None


def _password(basic: str) -> bytes | None:
    try:
        return base64.b64decode(basic, validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return None


def _without_port(authority: str) -> str:
    found = _AUTHORITY.fullmatch(authority)
    return _plain_address(found[1]) if found else ""


def _plain_address(host: str) -> str:
    """IPv6 addresses in their shortest form; other hosts as they are."""
    if not host.startswith("["):
        return host
    try:
        return f"[{ipaddress.IPv6Address(host[1:-1])}]"
    except ValueError:
        return ""


def _host_name(name: str) -> str:
    bare = f"[{name}]" if name.count(":") > 1 and not name.startswith("[") else name
    found = _AUTHORITY.fullmatch(bare.lower())
    host = _plain_address(found[1]) if found and found[1] == bare.lower() else ""
    if not host:
        raise UsageError(
            f"the allowed host {name!r}",
            expected="a name or an address, without scheme, port or wildcard",
            fix="Write it as a browser's address line shows it: --allow-host pictures.example",
        )
    return host


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host.lower() == "localhost"
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
