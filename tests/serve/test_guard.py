"""Who may call, and how much they may send. Reports 27, 28, 38, 39 and 40 of the list of known incidents.

Every check is switched off once, and what it holds off then comes in: so the tests would notice.
"""

import asyncio
import base64
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest

from latentrt.engines.errors import UsageError
from latentrt.serve.door import access, body, guard
from latentrt.serve.door.access import LOOPBACK_HOSTS, Access, allow, check_exposure
from latentrt.serve.door.body import BodyLimits
from latentrt.serve.door.guard import KEY_ID, Guard
from latentrt.serve.door.keys import NO_KEYS, Keys, keys_of_environment
from latentrt.serve.jobs.job import ANYONE
from tests.serve.asgi import Client, Inside, Message, run, scope_of

KEY, OTHER = "right-0123456789abcdef", "other-0123456789abcdef"
KEYS = keys_of_environment("KEYS", {"KEYS": f"{OTHER} {KEY}"})
KEY_NAME = hashlib.sha256(KEY.encode()).hexdigest()[:8]
LISTED = "https://pictures.example"
OWN = ("Host", "localhost:7860")
JSON = ("Content-Type", "application/json")
BEARER = ("Authorization", f"Bearer {KEY}")
SMALL = BodyLimits(size=100, seconds=30)

Headers = Iterable[tuple[str, str]]


def call(
    who: Access,
    headers: Headers,
    *,
    method: str = "POST",
    path: str = "/v1/jobs",
    client: Client | None = None,
    limits: BodyLimits = SMALL,
    application: Any = None,
) -> tuple[Client, Inside]:
    client, inside = client or Client(), Inside()

    def make(loop: Any) -> Any:
        door = Guard(application or inside, who, limits=limits, now=loop.time)
        return door(scope_of(method, path, headers), client.receive, client.send)

    run(make)
    return client, inside


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────

# a kind of route: its path, and the methods it is asked with, HEAD and OPTIONS among them
ROUTES = {
    "page": ("/", ("GET", "HEAD", "OPTIONS")),
    "static": ("/static/page.js", ("GET", "HEAD", "OPTIONS")),
    "generate": ("/v1/images/generations", ("POST", "OPTIONS", "GET")),
    "sdapi": ("/sdapi/v1/txt2img", ("POST", "OPTIONS")),
    "progress": ("/sdapi/v1/progress", ("GET", "HEAD")),
    "job": ("/v1/jobs/0123", ("GET", "DELETE", "PUT", "PATCH", "HEAD")),
    "events": ("/v1/jobs/0123/events", ("GET",)),
    "absolute": ("http://localhost:7860/v1/jobs", ("GET", "POST", "DELETE")),
    "health": ("/health", ("GET", "HEAD", "POST")),
}
# who asks: headers, and what a server without keys and one with keys answer
WHO: dict[str, tuple[tuple[tuple[str, str], ...], int, int]] = {
    "own host": ((OWN,), 200, 401),
    "foreign host": ((("Host", "evil.example:7860"), BEARER), 421, 421),
    "no host": ((BEARER,), 421, 421),
    "foreign origin": ((OWN, ("Origin", "http://evil.example"), BEARER), 403, 403),
    "null origin": ((OWN, ("Origin", "null"), BEARER), 403, 403),
    "own origin": ((OWN, ("Origin", "http://localhost:7860")), 200, 401),
    "cross-site": ((OWN, ("Sec-Fetch-Site", "cross-site"), BEARER), 403, 403),
    "no key": ((OWN, ("Authorization", "")), 200, 401),
    "wrong key": ((OWN, ("Authorization", "Bearer none")), 200, 401),
    "right key": ((OWN, BEARER), 200, 200),
}
TABLE = [
    pytest.param(kind, method, who, id=f"{kind}-{method}-{who}")
    for kind, (_, methods) in ROUTES.items()
    for method, who in itertools.product(methods, WHO)
]


@pytest.mark.parametrize(("kind", "method", "who"), TABLE)
def test_who_may_call(kind: str, method: str, who: str) -> None:
    """Report 27: whatever the route and the method, a foreign Host stays outside."""
    path, _ = ROUTES[kind]
    headers, without_keys, with_keys = WHO[who]
    if kind == "health" and with_keys == 401:
        with_keys = 200
    for keys, expected in ((NO_KEYS, without_keys), (KEYS, with_keys)):
        client, inside = call(allow(keys=keys), (*headers, JSON), method=method, path=path)
        assert client.status == expected
        assert len(inside.scopes) == (expected == 200)
        assert (client.read > 0) == (expected == 200)
        if expected in (403, 421) or method == "HEAD":
            assert client.body in (b"", b"0")
        assert not any("access-control" in name for name in client.headers)


# ── hosts ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1:65535", "[::1]", "[::1]:7860", "[0:0:0:0:0:0:0:1]:7860"]
)
def test_names_of_this_machine_with_any_port(host: str) -> None:
    assert call(allow(), [("Host", host)])[0].status == 200


@pytest.mark.parametrize(
    "host",
    [
        *(
            "",
            "evil.example",
            "localhost.evil.example",
            "evil.example:7860",
            "127.0.0.1.evil.example",
            "0.0.0.0",
        ),
        *("localhost:", "localhost:80:80", "user@localhost", "localhost@evil.example", "localhost/evil"),
        *(
            "localhost, evil.example",
            "[::1",
            "[::2]",
            "[not]",
            "[:::1]",
            "local\u00adhost",
            "localhost\x00",
            "localhost\u00a0",
        ),
    ],
)
def test_other_hosts_are_refused_with_an_empty_body(host: str) -> None:
    client, inside = call(allow(), [("Host", host)], method="GET")
    assert (client.status, client.body, inside.scopes) == (421, b"", [])
    assert client.headers == {"content-length": "0", "x-should-retry": "false", "connection": "close"}


def test_two_hosts_are_none() -> None:
    assert call(allow(), [OWN, OWN])[0].status == 421
    assert call(allow(), [OWN, ("Host", "evil.example")])[0].status == 421


@pytest.mark.parametrize(
    ("path", "status", "inner"),
    [
        ("http://localhost:7860/v1/jobs", 200, "/v1/jobs"),
        ("HTTPS://[::1]/", 200, "/"),
        ("http://127.0.0.1", 200, "/"),
        ("http://evil.example/v1/jobs", 421, None),
        ("http://localhost@evil.example/", 421, None),
        ("http:///v1/jobs", 421, None),
        ("evil.example:443", 421, None),
        ("localhost:7860", 421, None),
        ("", 421, None),
        ("ftp://localhost/", 421, None),
        ("*", 421, None),
        ("//evil.example/health", 200, "//evil.example/health"),
    ],
)
def test_targets_that_name_a_host(path: str, status: int, inner: str | None) -> None:
    """The routes see a path, so an absolute target is no way around what holds for paths."""
    client, inside = call(allow(), [OWN], path=path)
    assert client.status == status
    assert [scope["path"] for scope in inside.scopes] == ([] if inner is None else [inner])


def test_an_absolute_target_needs_the_key_that_its_path_needs() -> None:
    who = allow(keys=KEYS)
    assert call(who, [OWN], path="http://localhost/health")[0].status == 200
    assert call(who, [OWN], path="http://localhost/v1/jobs")[0].status == 401
    _, inside = call(who, [OWN], path="http://localhost/health")
    assert inside.scopes[0]["raw_path"] is None


def test_the_server_as_a_whole_may_be_asked_for_its_options() -> None:
    assert call(allow(), [OWN], method="OPTIONS", path="*")[0].status == 200


def test_hosts_are_given_by_name() -> None:
    who = allow(hosts=["Pictures.Example", "192.168.1.5", "fe80::1", "[2001:db8::1]"])
    assert who.hosts - LOOPBACK_HOSTS == {"pictures.example", "192.168.1.5", "[fe80::1]", "[2001:db8::1]"}
    for host in ("pictures.example:443", "192.168.1.5:7860", "[FE80:0::1]:1", "localhost"):
        assert call(who, [("Host", host)])[0].status == 200
    assert call(who, [("Host", "www.pictures.example")])[0].status == 421


@pytest.mark.parametrize(
    "name", ["", "*", "*.example", "http://a.example", "a.example:80", "a/b", "[::1", "[x]"]
)
def test_what_is_no_host_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="the allowed host"):
        allow(hosts=[name])


# ── origins ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "origin", ["http://localhost:7860", "https://localhost:7860", "HTTP://LOCALHOST:7860"]
)
def test_the_own_page_may_call(origin: str) -> None:
    client, _ = call(allow(), [OWN, ("Origin", origin), ("Sec-Fetch-Site", "same-origin"), JSON])
    assert client.status == 200
    assert client.headers == {"x-inside": "1"}


@pytest.mark.parametrize(
    "origin",
    [
        *("", "null", "http://localhost", "http://localhost:7861", "http://127.0.0.1:7860", "file://"),
        *("http://localhost:7860.evil.example", "http://localhost:7860/", "ftp://localhost:7860"),
        *(LISTED + ".evil.example", "http://pictures.example", LISTED.upper(), f"{LISTED}, {LISTED}", "*"),
    ],
)
def test_other_origins_may_not(origin: str) -> None:
    client, inside = call(allow(origins=[LISTED]), [OWN, ("Origin", origin), JSON])
    assert (client.status, client.body, inside.scopes) == (403, b"", [])
    assert client.headers.keys() == {"content-length", "x-should-retry", "vary", "connection"}


def test_a_link_of_another_site_to_the_page_may_be_followed() -> None:
    """To the page alone, and by a person: what foreign pages fetch or show in frames of theirs is refused."""
    site, goes = ("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Mode", "navigate")
    for keys in (NO_KEYS, KEYS):
        who = allow(keys=keys, open_paths=["/"])
        assert call(who, [OWN, site, goes], method="GET", path="/")[0].status == 200
        for headers, method, path in (
            ([OWN, site, ("Sec-Fetch-Mode", "no-cors")], "GET", "/"),
            ([OWN, site], "GET", "/"),
            ([OWN, site, goes], "POST", "/"),
            ([OWN, site, goes], "GET", "/v1/jobs"),
            ([OWN, site, goes], "GET", "/static/page.js"),
        ):
            assert call(who, headers, method=method, path=path)[0].status == 403
        assert call(who, [("Host", "evil.example"), site, goes], method="GET", path="/")[0].status == 421


def test_two_origins_are_none() -> None:
    for second in (LISTED, "http://localhost:7860"):
        headers = [OWN, ("Origin", LISTED), ("Origin", second)]
        assert call(allow(origins=[LISTED]), headers)[0].status == 403


def test_a_listed_page_may_call_and_read_the_answer() -> None:
    who = allow(origins=[LISTED])
    client, _ = call(who, [OWN, ("Origin", LISTED), ("Sec-Fetch-Site", "cross-site"), JSON])
    assert client.status == 200
    assert client.headers["access-control-allow-origin"] == LISTED
    assert "retry-after" in client.headers["access-control-expose-headers"]
    assert client.headers["vary"] == "Origin"
    assert client.headers["x-inside"] == "1"
    assert "access-control-allow-credentials" not in client.headers


def test_a_cache_keeps_answers_to_listed_pages_apart() -> None:
    client, _ = call(allow(origins=[LISTED]), [OWN])
    assert client.headers == {"x-inside": "1", "vary": "Origin"}


def test_a_listed_page_reads_why_it_is_refused() -> None:
    client, _ = call(allow(origins=[LISTED], keys=KEYS), [OWN, ("Origin", LISTED), JSON])
    assert client.status == 401
    assert client.headers["access-control-allow-origin"] == LISTED


def preflight(origin: str, asked: str = "authorization,x-stainless-os") -> list[tuple[str, str]]:
    method, names = ("Access-Control-Request-Method", "POST"), ("Access-Control-Request-Headers", asked)
    return [OWN, ("Origin", origin), ("Sec-Fetch-Site", "cross-site"), method, names]


@pytest.mark.parametrize("keys", [NO_KEYS, KEYS])
def test_a_browser_may_ask_what_a_listed_page_may_send(keys: Keys) -> None:
    """It asks without a key, and the application does not hear of it."""
    client, inside = call(allow(origins=[LISTED], keys=keys), preflight(LISTED), method="OPTIONS")
    assert (client.status, client.body, inside.scopes) == (204, b"", [])
    assert client.headers["access-control-allow-origin"] == LISTED
    assert client.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
    assert "DELETE" in client.headers["access-control-allow-methods"]
    assert "content-length" not in client.headers
    assert "connection" not in client.headers


@pytest.mark.parametrize("asked", ["", "x" * 1025, "a\r\nb: c", "*", "a b", "a,,b"])
def test_what_is_no_list_of_headers_is_not_allowed(asked: str) -> None:
    client, _ = call(allow(origins=[LISTED]), preflight(LISTED, asked), method="OPTIONS")
    assert client.status == 204
    assert "access-control-allow-headers" not in client.headers


def test_a_browser_may_not_ask_for_another_page() -> None:
    for who in (allow(), allow(origins=["https://another.example"], keys=KEYS)):
        assert call(who, preflight(LISTED), method="OPTIONS")[0].status == 403


@pytest.mark.parametrize(
    "origin", ["null", "*", "http://*", "pictures.example", "https://A.example", "https://a/b", ""]
)
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(UsageError, match="the allowed origin"):
        allow(origins=[origin])


def test_lists_may_be_read_once() -> None:
    who = allow(hosts=iter(["a.example"]), origins=iter([LISTED]), open_paths=iter(["/page"]))
    assert ("a.example" in who.hosts, LISTED in who.origins, who.open_paths) == (True, True, {"/page"})


# ── forms ───────────────────────────────────────────────────────────────────────────────────────────────

FORMS = [
    "application/x-www-form-urlencoded",
    "text/plain;charset=UTF-8",
    "multipart/form-data; boundary=x",
    " Text/Plain ",
]


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_forms_of_other_pages(kind: str, method: str) -> None:
    """Report 28: a form needs no leave of the browser, so its Origin or a key must speak for it."""
    form = ("Content-Type", kind)
    for origin, expected in (
        (None, 200),
        ("http://localhost:7860", 200),
        ("http://evil.example", 403),
        (LISTED, 403),
    ):
        headers = [OWN, form, *([("Origin", origin)] if origin else [])]
        client, inside = call(allow(origins=[LISTED]), headers, method=method)
        assert (client.status, len(inside.scopes)) == (expected, expected == 200)
    with_key = [OWN, form, ("Origin", LISTED), BEARER]
    assert call(allow(origins=[LISTED], keys=KEYS), with_key, method=method)[0].status == 200
    assert call(allow(origins=[LISTED]), [OWN, JSON, ("Origin", LISTED)], method=method)[0].status == 200


def test_one_of_two_content_types_is_enough_for_a_form() -> None:
    headers = [OWN, JSON, ("Content-Type", FORMS[0]), ("Origin", LISTED)]
    assert call(allow(origins=[LISTED]), headers)[0].status == 403


# ── keys ────────────────────────────────────────────────────────────────────────────────────────────────


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize(
    "header",
    [
        ("Authorization", f"Bearer {KEY}"),
        ("authorization", f"bearer  {KEY} "),
        ("X-Api-Key", KEY),
        ("Authorization", basic("anyone", KEY)),
        ("Authorization", basic("", KEY)),
    ],
)
def test_ways_to_send_a_key(header: tuple[str, str]) -> None:
    client, inside = call(allow(keys=KEYS), [OWN, header])
    assert client.status == 200
    assert inside.scopes[0][KEY_ID] == KEY_NAME


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "")],
        [("Authorization", "Bearer")],
        [("Authorization", "Bearer none")],
        [("Authorization", KEY)],
        [("Authorization", f"Token {KEY}")],
        [("Authorization", basic(KEY, ""))],
        [("Authorization", basic(KEY, "wrong"))],
        [("Authorization", "Basic !!!")],
        [("Authorization", "Basic \u00e9")],
        [("Authorization", f"Basic {KEY}")],
        [("X-Api-Key", "")],
        [("X-Api-Key", "none"), BEARER],
        [BEARER, BEARER],
        [("X-Api-Key", KEY.upper())],
    ],
)
def test_what_is_no_key(headers: list[tuple[str, str]]) -> None:
    client, inside = call(allow(keys=KEYS), [OWN, *headers])
    assert (client.status, inside.scopes, client.read) == (401, [], 0)
    assert client.headers["www-authenticate"] == "Bearer"
    error = json.loads(client.body)["error"]
    assert (error["type"], error["code"], error["param"]) == ("authentication_error", "invalid_api_key", None)
    assert "Bearer KEY" in error["message"]
    # without keys nobody looks
    _, inside = call(allow(), [OWN, *headers])
    assert inside.scopes[0][KEY_ID] == ANYONE


def test_open_paths_need_no_key_and_know_one() -> None:
    who = allow(keys=KEYS, open_paths=["/health"])
    for header, name in (((), ANYONE), ((("Authorization", "Bearer none"),), ANYONE), ((BEARER,), KEY_NAME)):
        client, inside = call(who, [OWN, *header], method="GET", path="/health")
        assert (client.status, inside.scopes[0][KEY_ID]) == (200, name)
    for path in ("/health/", "/health/../v1/jobs", "/HEALTH", "/healthy", "//health"):
        assert call(who, [OWN], method="GET", path=path)[0].status == 401


def test_a_client_cannot_write_its_key_id() -> None:
    _, inside = call(allow(), [OWN, (KEY_ID, "0badcafe")])
    assert inside.scopes[0][KEY_ID] == ANYONE


def test_every_key_is_compared_on_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Report 38."""
    counts: list[int] = []
    for sent in (KEY, OTHER, "wrong"):
        compared: list[Any] = []
        monkeypatch.setattr("hmac.compare_digest", lambda a, b, into=compared: into.append(b) or a == b)
        call(allow(keys=KEYS), [OWN, ("X-Api-Key", sent)])
        counts.append(len(compared))
    assert counts == [len(KEYS.digests)] * 3 == [2] * 3


def test_the_key_comes_before_the_body() -> None:
    """Report 39: nothing is read of a large body from somebody without a key."""
    for headers in ([], [("Content-Length", "1000000000")]):
        client = Client(chunks=itertools.repeat(b"x" * 65536))
        call(allow(keys=KEYS), [OWN, *headers], client=client)
        assert (client.status, client.read, client.headers["connection"]) == (401, 0, "close")


# ── where the server listens ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost", "127.0.0.1", "127.1.2.3", "::1", "[::1]", "::ffff:127.0.0.1"]
)
def test_this_machine_alone_needs_no_key(host: str) -> None:
    check_exposure(host, NO_KEYS)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "0.0.0.0",
        "::",
        "[::]",
        "192.168.1.5",
        "8.8.8.8",
        "::ffff:8.8.8.8",
        "pictures.example",
        "localhost.example",
    ],
)
def test_other_machines_need_a_key(host: str) -> None:
    check_exposure(host, KEYS)
    with pytest.raises(UsageError, match="without a key") as caught:
        check_exposure(host, NO_KEYS)
    assert "--key-file FILE" in caught.value.fix
    assert caught.value.exit_code == 2


# ── bodies ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [0, 1, 99, 100])
def test_a_body_within_the_limit_arrives(size: int) -> None:
    client = Client(chunks=[b"x" * size])
    _, inside = call(allow(), [OWN, ("Content-Length", str(size))], client=client)
    assert (client.status, inside.bodies) == (200, [size])


@pytest.mark.parametrize("claim", ["101", "1000000000000", "9" * 19])
def test_a_claim_above_the_limit_is_refused_unread(claim: str) -> None:
    client, inside = call(allow(), [OWN, ("Content-Length", claim)])
    assert (client.status, client.read, inside.scopes) == (413, 0, [])
    assert json.loads(client.body)["error"]["code"] == "body_too_large"
    assert client.headers["connection"] == "close"
    assert client.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("claims", [["-1"], ["1e2"], ["0x1"], [""], ["9" * 20], ["5", "6"], ["٣"], ["1_0"]])
def test_a_claim_that_is_no_number(claims: list[str]) -> None:
    scope = scope_of(headers=[OWN])
    scope["headers"] += [(b"content-length", claim.encode()) for claim in claims]
    client, inside = Client(), Inside()
    run(lambda loop: Guard(inside, allow(), now=loop.time)(scope, client.receive, client.send))
    assert (client.status, client.read) == (400, 0)
    assert json.loads(client.body)["error"]["code"] == "content_length"


def test_two_ways_to_say_where_a_body_ends_are_refused() -> None:
    """RFC 9112, 6.3: else a proxy may take for a request what is a body here."""
    both = [("Content-Length", "3"), ("Transfer-Encoding", "chunked")]
    client, inside = call(allow(), [OWN, *both])
    assert (client.status, inside.scopes) == (400, [])
    assert json.loads(client.body)["error"]["code"] == "content_length"
    assert client.headers["connection"] == "close"
    assert call(allow(), [OWN, both[1]])[0].status == 200


def test_the_same_claim_twice_is_one() -> None:
    headers = [OWN, ("Content-Length", "3"), ("Content-Length", "3")]
    assert call(allow(), headers, client=Client(chunks=[b"abc"]))[0].status == 200


@pytest.mark.parametrize("claim", [None, "5"])
def test_bytes_are_counted_whatever_was_claimed(claim: str | None) -> None:
    """An endless body ends with the message that is too much; nothing after it is read."""
    client = Client(chunks=itertools.repeat(b"x" * 30))
    headers = [OWN, *([("Content-Length", claim)] if claim else [])]
    _, inside = call(allow(), headers, client=client)
    assert (client.status, client.read, inside.bodies) == (413, 4, [])


def test_a_body_of_tiny_chunks_is_one_body() -> None:
    """Report 40, with the chunks that one connection's buffer would have made of them."""
    size = 2**20
    chunks = itertools.chain(itertools.repeat(b"x", 2**14), itertools.repeat(b"x" * 63, (size - 2**14) // 63))
    total = 2**14 + (size - 2**14) // 63 * 63
    client = Client(chunks=chunks)
    _, inside = call(allow(), [OWN], client=client, limits=BodyLimits(size=total))
    assert (client.status, inside.bodies) == (200, [total])
    client = Client(chunks=itertools.repeat(b"x"))
    call(allow(), [OWN], client=client, limits=BodyLimits(size=2**14))
    assert (client.status, client.read) == (413, 2**14 + 1)


@pytest.mark.parametrize(
    ("gaps", "status"),
    [
        ([0.0, 29.0, 0.9], 200),
        ([31.0], 408),
        ([10.0, 10.0, 9.0, 2.0], 408),
        ([1e9], 408),
    ],
)
def test_a_body_has_a_time_as_a_whole(gaps: list[float], status: int) -> None:
    """Report 41: a byte now and then does not keep a connection."""
    client = Client(chunks=[b"x"] * len(gaps), gaps=iter(gaps))
    _, inside = call(allow(), [OWN], client=client)
    assert client.status == status
    assert inside.bodies == ([len(gaps)] if status == 200 else [])
    if status == 408:
        assert json.loads(client.body)["error"]["code"] == "body_timeout"
        assert client.headers["connection"] == "close"
        assert "x-should-retry" not in client.headers


def test_time_that_is_over_before_the_body_is_asked_for() -> None:
    async def late(scope: Message, receive: Any, send: Any) -> None:
        await asyncio.sleep(31)
        await receive()

    client = Client()
    call(allow(), [OWN], client=client, application=late)
    assert (client.status, client.read) == (408, 0)


def test_the_end_of_a_connection_may_take_any_time() -> None:
    """After the body an application listens for it, while it draws."""
    seen: list[str] = []

    async def drawing(scope: Message, receive: Any, send: Any) -> None:
        seen.extend([(await receive())["type"], (await receive())["type"]])

    call(allow(), [OWN], client=Client(gaps=iter([0.0, 3600.0])), application=drawing)
    assert seen == ["http.request", "http.disconnect"]


def test_a_client_that_leaves_in_its_body_is_not_refused() -> None:
    seen: list[str] = []

    async def application(scope: Message, receive: Any, send: Any) -> None:
        seen.extend([(await receive())["type"], (await receive())["type"], (await receive())["type"]])

    class Leaving(Client):
        async def receive(self) -> Message:
            self.read += 1
            part = {"type": "http.request", "body": b"x", "more_body": True}
            return part if self.read == 1 else {"type": "http.disconnect"}

    client = Leaving()
    call(allow(), [OWN], client=client, application=application)
    assert seen == ["http.request", "http.disconnect", "http.disconnect"]
    assert client.sent == []


async def _swallows(scope: Message, receive: Any, send: Any) -> None:
    """Like frameworks that take every error of reading for a malformed body."""
    for _ in range(2):
        try:
            while (await receive()).get("more_body"):
                pass
        except Exception:
            status = 400
        else:
            status = 200
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b"There was an error parsing the body"})


async def _raises_another(scope: Message, receive: Any, send: Any) -> None:
    try:
        while (await receive()).get("more_body"):
            pass
    except Exception as error:
        raise ValueError("no body") from error


async def _returns(scope: Message, receive: Any, send: Any) -> None:
    await _swallows(scope, receive, _nothing)


async def _nothing(message: Message) -> None:
    pass


@pytest.mark.parametrize("application", [_swallows, _raises_another, _returns])
def test_an_application_cannot_hide_a_refused_body(application: Any) -> None:
    client = Client(chunks=itertools.repeat(b"x" * 30))
    call(allow(), [OWN], client=client, application=application)
    assert (client.status, client.read) == (413, 4)
    assert b"parsing" not in client.body


def test_errors_of_the_application_are_its_own() -> None:
    async def broken(scope: Message, receive: Any, send: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        call(allow(), [OWN], application=broken)


def test_an_answer_that_has_begun_is_not_begun_again() -> None:
    async def early(scope: Message, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await receive()

    client = Client(chunks=itertools.repeat(b"x" * 30))
    with pytest.raises(body.BodyRefusedError, match="body_too_large"):
        call(allow(), [OWN], client=client, application=early)
    assert client.status == 200


def test_fastapi_answers_413_where_it_would_say_400() -> None:
    fastapi = pytest.importorskip("fastapi")
    application = fastapi.FastAPI()

    @application.post("/v1/jobs")
    async def jobs(wanted: dict[str, Any]) -> dict[str, Any]:
        return wanted

    client = Client(chunks=itertools.repeat(b" " * 30))
    call(allow(), [OWN, JSON], client=client, application=application)
    assert client.status == 413
    client = Client(chunks=[b'{"a":', b" 1}"])
    call(allow(), [OWN, JSON], client=client, application=application)
    assert (client.status, client.body) == (200, b'{"a":1}')


# ── other connections ───────────────────────────────────────────────────────────────────────────────────


def test_there_are_no_websockets() -> None:
    client, inside = Client(), Inside()
    scope = {**scope_of(headers=[OWN]), "type": "websocket"}
    run(lambda loop: Guard(inside, allow(), now=loop.time)(scope, client.receive, client.send))
    assert client.sent == [{"type": "websocket.close", "code": 1008}]
    assert inside.scopes == []


def test_the_start_of_the_server_goes_through() -> None:
    client, inside = Client(), Inside()
    scope = {"type": "lifespan"}
    run(lambda loop: Guard(inside, allow(), now=loop.time)(scope, client.receive, client.send))
    assert inside.scopes == [scope]


def test_what_the_guard_does_not_know_goes_nowhere() -> None:
    client, inside = Client(), Inside()
    run(lambda loop: Guard(inside, allow(), now=loop.time)({"type": "new"}, client.receive, client.send))
    assert (client.sent, inside.scopes) == ([], [])


def test_http_2_has_no_connection_header() -> None:
    scope = {**scope_of(), "http_version": "2"}
    client = Client()
    run(lambda loop: Guard(Inside(), allow(), now=loop.time)(scope, client.receive, client.send))
    assert client.status == 421
    assert "connection" not in client.headers


def test_routes_may_have_other_forms_of_a_refusal() -> None:
    client = Client()
    other: Callable[..., bytes] = lambda path, refusal: f'{{"detail": "{path} {refusal.code}"}}'.encode()  # noqa: E731
    door = Guard(Inside(), allow(keys=KEYS), refusal_body=other)
    run(lambda loop: door(scope_of(path="/sdapi/v1/txt2img", headers=[OWN]), client.receive, client.send))
    assert json.loads(client.body) == {"detail": "/sdapi/v1/txt2img invalid_api_key"}


def test_refusals_are_logged_without_keys_and_control_characters(logged: list[str]) -> None:
    headers = [("Host", "evil\x1b[31m"), ("Authorization", "Bearer secret-secret-secret")]
    call(allow(keys=KEYS), headers, path="/a\n2026 forged" + "x" * 1000)
    (line,) = logged
    assert "foreign_host" in line
    assert "secret" not in line
    assert line.isprintable()
    assert len(line) < 600


# ── each check switched off ─────────────────────────────────────────────────────────────────────────────

FOREIGN = ("Origin", "http://evil.example")
Test = Callable[[], None]
# a check of the head, and a test that must notice when it is gone
NOTICED: dict[str, Test] = {
    "refuse_host": lambda: test_other_hosts_are_refused_with_an_empty_body("evil.example:7860"),
    "refuse_site": lambda: test_who_may_call("progress", "GET", "cross-site"),
    "refuse_origin": lambda: test_other_origins_may_not("null"),
    "refuse_key": lambda: test_who_may_call("job", "GET", "wrong key"),
    "refuse_form": lambda: test_forms_of_other_pages("text/plain", "POST"),
}


def test_every_check_has_a_test_that_notices() -> None:
    assert [check.__name__ for check in access.CHECKS] == list(NOTICED)


@pytest.mark.parametrize("name", NOTICED)
def test_a_check_that_is_gone_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    NOTICED[name]()
    left = tuple(check for check in access.CHECKS if check.__name__ != name)
    monkeypatch.setattr(access, "CHECKS", left)
    with pytest.raises(AssertionError):
        NOTICED[name]()


def unlimited(door: type[body.Body]) -> type[body.Body]:
    class Unlimited(door):
        def __init__(self, receive: Any, limits: BodyLimits, now: Any) -> None:
            super().__init__(receive, replace(limits, size=2**62), now)

    return Unlimited


def untimed(door: type[body.Body]) -> type[body.Body]:
    class Untimed(door):
        def __init__(self, receive: Any, limits: BodyLimits, now: Any) -> None:
            super().__init__(receive, replace(limits, seconds=2.0**40), now)

    return Untimed


@pytest.mark.parametrize(
    ("target", "mutant", "test"),
    [
        (
            "refuse_claim",
            lambda head, limits: None,
            lambda: test_a_claim_above_the_limit_is_refused_unread("101"),
        ),
        ("Body", unlimited(body.Body), lambda: endless_body_is_refused()),
        ("Body", untimed(body.Body), lambda: test_a_body_has_a_time_as_a_whole([10.0, 10.0, 9.0, 2.0], 408)),
    ],
    ids=["claim", "size", "time"],
)
def test_a_limit_that_is_gone_is_noticed(
    monkeypatch: pytest.MonkeyPatch, target: str, mutant: Any, test: Test
) -> None:
    test()
    monkeypatch.setattr(guard, target, mutant)
    with pytest.raises(AssertionError):
        test()


def endless_body_is_refused() -> None:
    client = Client(chunks=itertools.repeat(b"x" * 30, 1000))
    call(allow(), [OWN], client=client)
    assert client.status == 413


@pytest.mark.parametrize(
    ("name", "mutant", "test"),
    [
        (
            "open_paths",
            lambda: frozenset({"/v1/jobs/0123"}),
            lambda: test_who_may_call("job", "GET", "no key"),
        ),
        (
            "hosts",
            lambda: LOOPBACK_HOSTS | {"evil.example"},
            lambda: test_who_may_call("page", "GET", "foreign host"),
        ),
        ("origins", lambda: frozenset({"null"}), lambda: test_who_may_call("page", "GET", "null origin")),
    ],
)
def test_a_list_that_is_too_long_is_noticed(
    monkeypatch: pytest.MonkeyPatch, name: str, mutant: Callable[[], Any], test: Test
) -> None:
    test()
    plain = allow
    monkeypatch.setitem(globals(), "allow", lambda **options: replace(plain(**options), **{name: mutant()}))
    with pytest.raises(AssertionError):
        test()


def test_an_exposure_check_that_is_gone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "_is_loopback", lambda host: True)
    with pytest.raises(pytest.fail.Exception):
        test_other_machines_need_a_key("0.0.0.0")
