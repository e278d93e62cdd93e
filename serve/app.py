"""The application: routes behind the guard, one form of errors for each API, and what runs beside them."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from ..engines.errors import LatentrtError, UsageError
from ..engines.installed import latentrt_version
from . import native, page_files
from .access import Access, Refusal
from .answers import Answer, ErrorForm, answer_to
from .body import BODY_LIMITS, BodyLimits, Message, Receive
from .failure import Failure
from .guard import Guard, Scope, Send
from .server import Server

_LOG = logging.getLogger(__name__)
LOOK_S = 1.0  # between two looks at deadlines and workers
REQUEST_ID = b"x-request-id"
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
    """One of the server's APIs: its routes, and the form of errors on paths that begin so."""

    router: APIRouter
    error_form: ErrorForm
    prefixes: tuple[str, ...]


NATIVE = Api(router=native.router, error_form=native.error_form, prefixes=("/",))
APIS = (NATIVE,)  # the first whose prefix fits is a path's


def form_of(path: str) -> ErrorForm:
    """The form of errors on a path."""
    return next(api.error_form for api in APIS if path.startswith(api.prefixes))


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
    app.include_router(page_files.router)
    access = replace(access, open_paths=access.open_paths | page_files.PAGE_PATHS)
    _add_health(app, server)
    app.add_exception_handler(Exception, _internal)
    app.add_exception_handler(LatentrtError, _ours)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    return Guard(Labelled(app), access, limits=limits, refusal_body=_refused)


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


# ── errors ─────────────────────────────────────────────────────────────────────────────────────────


def _answered(request: Request, answer: Answer) -> Response:
    return JSONResponse(form_of(request.url.path)(answer), answer.status, headers=answer.headers)


async def _ours(request: Request, error: Exception) -> Response:
    return _answered(request, answer_to(error))


async def _internal(request: Request, error: Exception) -> Response:
    return _answered(request, answer_to(error))


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
    return JSONResponse(form_of(request.url.path)(answer), error.status_code, headers=headers)


def _refused(path: str, refusal: Refusal) -> bytes:
    told = {name: getattr(refusal, name) for name in ("found", "expected", "fix")}
    failure = Failure(type="refused", retryable=False, **told)
    answer = Answer(status=refusal.status, code=refusal.code, failure=failure)
    return bytes(JSONResponse(form_of(path)(answer)).body)


class Labelled:
    """Gives every answer an id, which the log has too, and the headers that keep browsers safe."""

    def __init__(self, application: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection, as ASGI hands it over."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        name, answered = secrets.token_hex(8), False

        async def labelled(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                _LOG.info("%s %s %s %s", name, scope["method"], scope["path"], message["status"])
                headers = [*message.get("headers", ()), (REQUEST_ID, name.encode()), *_HEADERS]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._application(scope, receive, labelled)
        except Exception:
            _LOG.exception("%s %s %s", name, scope["method"], scope["path"])
            if not answered:
                raise
            # Starlette has answered, and raises again: uvicorn would close the connection behind the answer.
