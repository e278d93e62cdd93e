"""The application: routes behind the guard, one form of errors for each API, and what runs beside them."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, cast

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Match

from ..engines.errors import LatentrtError, UsageError
from ..engines.installed import latentrt_version
from . import native, page_files
from .a1111 import routes as a1111
from .a1111.document import bodies as a1111_bodies
from .answers import Answer, ErrorForm, answer_to
from .door.access import HEALTH_PATHS, Access, Refusal
from .door.body import BODY_LIMITS, BodyLimits, Message, Receive
from .door.guard import KEY_ID, Application, Guard, Scope, Send
from .jobs.failure import Failure
from .log_lines import log_job, log_line
from .metrics import PATH as METRICS
from .metrics import Metrics
from .openai import routes as openai
from .openai.document import bodies as openai_bodies
from .server import Server

_LOG = logging.getLogger(__name__)
LOOK_S = 1.0  # between two looks at deadlines and workers
REQUEST_ID = b"x-request-id"
GONE = 499  # nginx's status, in logs alone, of a request whose client left before there was an answer
# The page's own files alone; pictures are blobs of what it has fetched.
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Api:
    """One of the server's APIs.

    Attributes:
        router: its routes.
        error_form: errors on paths that begin with one of `prefixes`.
        bodies: path -> the body of its POST in the OpenAPI document, which depends on the models.
    """

    router: APIRouter
    error_form: ErrorForm
    prefixes: tuple[str, ...]
    bodies: Callable[[Server], Mapping[str, Any]]


NATIVE = Api(
    router=native.router,
    error_form=native.error_form,
    prefixes=native.PREFIXES,
    bodies=native.bodies,
)
OPENAI = Api(
    router=openai.router,
    error_form=openai.error_form,
    prefixes=("/v1/",),  # what is none of ours there was meant for OpenAI's clients
    bodies=openai_bodies,
)
A1111 = Api(router=a1111.router, error_form=a1111.error_form, prefixes=a1111.PREFIXES, bodies=a1111_bodies)
APIS = (NATIVE, OPENAI, A1111)  # the first whose prefix fits is a path's


def form_of(path: str) -> ErrorForm:
    """The form of errors on a path."""
    return next((api.error_form for api in APIS if path.startswith(api.prefixes)), native.error_form)


def create_app(server: Server, access: Access, limits: BodyLimits = BODY_LIMITS) -> Guard:
    """The ASGI application of a server, behind its guard. The server is started by who made it."""

    @asynccontextmanager
    async def beside(app: FastAPI) -> AsyncGenerator[None]:
        looking = asyncio.create_task(_look(server))
        yield
        looking.cancel()
        with suppress(asyncio.CancelledError):
            await looking

    app = FastAPI(
        title="latentrt", version=latentrt_version(), docs_url=None, redoc_url=None, lifespan=beside
    )
    app.state.server = server
    for api in APIS:
        app.include_router(api.router)
    metrics = Metrics(server)
    server.jobs.watch(log_job)
    app.include_router(page_files.router)
    access = replace(access, open_paths=access.open_paths | page_files.PAGE_PATHS)
    _add_health(app, server)
    _add_metrics(app, metrics)
    _describe_bodies(app, server)
    app.add_exception_handler(Exception, _internal)
    app.add_exception_handler(ClientDisconnect, _left)
    app.add_exception_handler(LatentrtError, _ours)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    return Guard(
        Labelled(cast(Application, app), metrics.answered), access, limits=limits, refusal_body=_refused
    )


async def _look(server: Server) -> None:
    while True:
        await asyncio.sleep(LOOK_S)
        server.look()


def _add_health(app: FastAPI, server: Server) -> None:
    @app.get("/health/live", tags=["health"])
    async def live() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Whether the server should go on living: 503 when a worker is dead for good, or stuck."""
        return JSONResponse({"status": server.health}, 503 if server.health == "unhealthy" else 200)

    @app.get("/health", tags=["health"])
    @app.get("/health/ready", tags=["health"])
    async def ready() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Whether new jobs are taken."""
        return JSONResponse({"status": server.health}, 200 if server.health == "ready" else 503)


def _add_metrics(app: FastAPI, metrics: Metrics) -> None:
    @app.get(METRICS, tags=["health"], response_class=PlainTextResponse)
    async def counted(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        """What Prometheus reads. Where there are keys it needs one, unless the server was told otherwise."""
        text, media_type = await run_in_threadpool(metrics.text, request.headers.get("accept", ""))
        return Response(text, headers={"content-type": media_type, "cache-control": "no-store"})


def _describe_bodies(app: FastAPI, server: Server) -> None:
    """Put the fields of requests into the document: they are the models', and known when these are open."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        document = plain()
        for api in APIS:
            for path, body in api.bodies(server).items():
                document["paths"][path]["post"]["requestBody"] = body
        return document

    app.openapi = described


# ── errors ─────────────────────────────────────────────────────────────────────────────────────────


def _answered(request: Request, answer: Answer) -> Response:
    return JSONResponse(form_of(request.url.path)(answer), answer.status, headers=answer.headers)


async def _ours(request: Request, error: Exception) -> Response:
    return _answered(request, answer_to(error))


async def _internal(request: Request, error: Exception) -> Response:
    return _answered(request, answer_to(error))


async def _left(request: Request, error: Exception) -> Response:
    """Nobody reads it: the client has left in its body, which is no failure of the server's."""
    return Response(status_code=GONE)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    where = ".".join(str(part) for part in error.errors()[0]["loc"][1:])[:80]
    odd = UsageError(
        f"{where} is of another kind", expected="what /openapi.json says", fix=f"Change {where}."
    )
    return _answered(request, answer_to(odd))


async def _http(request: Request, error: Exception) -> Response:
    """Paths and methods that there are none of."""
    assert isinstance(error, HTTPException)
    failure = Failure(
        type="usage",
        found=f"{request.method} {request.url.path[:100]}: {error.detail}",
        expected="a route of /openapi.json",
        fix="Change the address or the method.",
        retryable=False,
    )
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    answer = Answer(status=error.status_code, code=code, failure=failure)
    headers = {**answer.headers, **(error.headers or {})}
    if error.status_code == 405:  # Starlette names the methods of the path's first route
        headers["Allow"] = ", ".join(_methods(request))
    return JSONResponse(form_of(request.url.path)(answer), error.status_code, headers=headers)


def _methods(request: Request) -> list[str]:
    """What the path takes, by all of its routes."""
    return [
        method
        for method in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
        if any(
            route.matches({**request.scope, "method": "GET" if method == "HEAD" else method})[0] is Match.FULL
            for route in request.app.routes
        )
    ]


def _refused(path: str, refusal: Refusal) -> bytes:
    told = {name: getattr(refusal, name) for name in ("found", "expected", "fix")}
    failure = Failure(type="refused", retryable=False, **told)
    answer = Answer(status=refusal.status, code=refusal.code, failure=failure)
    return bytes(JSONResponse(form_of(path)(answer)).body)


class Labelled:
    """Gives every answer an id, which the log has too, and the headers that keep browsers safe.

    Args:
        application: what answers.
        told: method, route and status of each answer, when it is whole or its client has gone.
    """

    def __init__(
        self,
        application: Application,
        told: Callable[[str, str | None, int], None],
    ) -> None:
        self._application, self._told = application, told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection, as ASGI hands it over."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        asked = scope["method"]
        answer = _Labelled(send, with_body=asked != "HEAD")
        if asked == "HEAD":
            scope = {**scope, "method": "GET"}
        try:
            await self._application(scope, receive, answer.send)
        except Exception:
            _LOG.exception("request id=%s", answer.name)
            if not answer.status:
                raise
            # Starlette has answered, and raises again: uvicorn would close the connection behind the answer.
        finally:
            self._told(asked, getattr(scope.get("route"), "path", None), answer.status or GONE)
            probe = scope["path"] in HEALTH_PATHS or scope["path"] == METRICS
            _LOG.log(logging.DEBUG if probe else logging.INFO, "%s", answer.line(scope))


class _Labelled:
    """One answer on its way."""

    def __init__(self, send: Send, *, with_body: bool) -> None:
        self._with_body = with_body
        self.name, self.status = secrets.token_hex(8), 0
        self._send, self._bytes, self._location, self._began = send, 0, None, time.monotonic()

    async def send(self, message: Message) -> None:
        """Hand a message on."""
        if message["type"] == "http.response.start":
            self.status = int(message["status"])
            own = list(message.get("headers", ()))
            self._location = next(
                (value.decode("latin-1") for name, value in own if name == b"location"), None
            )
            kept = [header for header in _HEADERS if header[0] not in {name for name, _ in own}]
            message = {**message, "headers": [*own, (REQUEST_ID, self.name.encode()), *kept]}
        elif not self._with_body:
            message = {**message, "body": b""}
        self._bytes += len(message.get("body", b""))
        await self._send(message)

    def line(self, scope: Scope) -> str:
        """What the log has of it: no query, no body."""
        return log_line(
            "request",
            id=self.name,
            key=scope.get(KEY_ID),
            method=scope["method"],
            path=scope["path"],
            status=self.status or GONE,
            location=self._location,
            bytes=self._bytes,
            seconds=time.monotonic() - self._began,
        )
