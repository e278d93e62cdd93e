"""OpenAI's images API: callers wait for their pictures, or watch them come.

POST /v1/images/generations   pictures of a prompt
POST /v1/images/edits         of a prompt and an image, a mask perhaps; a form, or JSON
POST /v1/images/variations    of an image alone, by models that vary one (unCLIP)
GET  /v1/images/linked/{…}    a picture that an answer has as `url`; without a key
GET  /v1/models               and /v1/models/{id}

Who leaves before the end cancels the job, unless it says that it wants to come back: with the header
`x-latentrt-on-disconnect: keep`, or with an `Idempotency-Key`. Then it is one of its /v1/jobs.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ...engines.errors import CancelledError, LatentrtError
from ..answers import Answer, answer_to, answer_to_failure, told_as
from ..door.links import Linked, follow
from ..fields import terms_of
from ..jobs.events import Data, Reading
from ..jobs.failure import Failure
from ..jobs.job import Job, Once, StoredPicture
from ..jobs.refusals import GoneError, UnknownJobError
from ..native import PING_S, owner_of, server_of
from ..pictures.exchange import FORMATS
from ..pictures.files import examine
from ..reading import once_of, read_fields
from ..server import Server, UnknownModelError
from ..waiting import ended, readings, unless_gone
from .fields import EDITS, GENERATIONS, RENAMED, VARIATIONS, Asked, Endpoint, order_of, read_asked

KEEP = "x-latentrt-on-disconnect"
IGNORED = "x-latentrt-ignored"
CLIENT_GONE = 499  # for the log; nobody reads the answer
_MOST_NAMED = 32  # fields, in a header
_SUFFIXES = {one.media_type: one.suffix for one in FORMATS.values()}
_KINDS = {one.media_type: name for name, one in FORMATS.items()}
# Words of errors -> the field that they are about.
_ABOUT = {**RENAMED, "width": "size", "height": "size", "pixels": "size", "pictures": "n"}

router = APIRouter(prefix="/v1", tags=["images"])


@router.post("/images/generations")
async def generations(request: Request) -> Response:
    """Pictures of a prompt."""
    return await _draw(request, GENERATIONS)


@router.post("/images/edits")
async def edits(request: Request) -> Response:
    """Pictures of a prompt that start from an image; with a mask, what is transparent there is repainted."""
    return await _draw(request, EDITS)


@router.post("/images/variations")
async def variations(request: Request) -> Response:
    """Pictures that vary an image."""
    return await _draw(request, VARIATIONS)


@router.get("/images/linked/{token}")
async def linked(request: Request, token: str) -> Response:
    """The picture that a link leads to."""
    found = follow(token)
    picture = server_of(request).jobs.picture(found.name, found.owner, found.index)
    headers = {"cache-control": "private, max-age=31536000, immutable"}
    # the link is all that is needed, so whoever has it may show the picture on a page
    headers["cross-origin-resource-policy"] = "cross-origin"
    return Response(picture.data, media_type=picture.media_type, headers=headers)


@router.get("/models")
async def models(request: Request) -> Response:
    """What is served, the default first."""
    server = server_of(request)
    return JSONResponse({"object": "list", "data": [_model(server, name) for name in server.models]})


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """One of them, by its own name: here no other name means it."""
    server = server_of(request)
    if name not in server.models:
        raise UnknownModelError(
            f"no model {name[:80]!r} is served",
            expected=f"one of {', '.join(server.models)}",
            fix="Use its name.",
        )
    return JSONResponse(_model(server, name))


def _model(server: Server, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(server.began), "owned_by": "latentrt"}


# ── errors ─────────────────────────────────────────────────────────────────────────────────────────


def error_form(answer: Answer, field: str | None = None) -> dict[str, Any]:
    """An error in the form of OpenAI's API; `field` is the one to blame."""
    types = {401: "authentication_error", 429: "rate_limit_error"}
    kind = types.get(answer.status, "server_error" if answer.status >= 500 else "invalid_request_error")
    return {
        "error": {
            "message": told_as(answer.message, RENAMED),
            "type": kind,
            "param": field,
            "code": answer.code,
        }
    }


def _refusal(error: LatentrtError, sent: Mapping[str, Any]) -> Response:
    answer = answer_to(error)
    return JSONResponse(
        error_form(answer, _to_blame(answer.failure, sent)), answer.status, headers=answer.headers
    )


def _to_blame(failure: Failure, sent: Mapping[str, Any]) -> str | None:
    """The field that an error is about: the first that it names and that was sent, or was to be."""
    fields = {*sent, *EDITS.needed}
    for word in re.findall(r"\w+", failure.found):
        for name in (word, _ABOUT.get(word)):
            if name in fields:
                return name
    return None


def _not_completed(job: Job) -> Answer:
    if job.error is not None:
        return answer_to_failure(job.error)
    return answer_to(
        CancelledError(
            f"the job was cancelled ({job.cancel_reason})",
            expected="a job that ends by itself",
            fix="Send the request again.",
        )
    )


# ── a request ──────────────────────────────────────────────────────────────────────────────────────


async def _draw(request: Request, endpoint: Endpoint) -> Response:
    server, owner = server_of(request), owner_of(request)
    sent, body = await read_fields(request)
    once = once_of(request, body)
    try:
        asked, job = await run_in_threadpool(_submit, server, owner, sent, endpoint, once)
    except LatentrtError as error:
        return _refusal(error, sent)
    kept = once is not None or request.headers.get(KEEP, "").strip().lower() == "keep"
    leaving = (lambda: None) if kept else partial(_leave, server, job)
    if asked.partial_images is not None:
        return _Watched(_stream(server, job, endpoint), leaving, _told_with(asked))
    done = await unless_gone(request.receive, ended(server.jobs, job), leaving)
    if done is None:
        return Response(status_code=CLIENT_GONE)
    if done.state != "completed":
        answer = _not_completed(done)
        return JSONResponse(error_form(answer), answer.status, headers=answer.headers)
    host = str(request.base_url).rstrip("/") if asked.response_format == "url" else None
    content = await run_in_threadpool(_answer, server, done, host)
    return Response(content, media_type="application/json", headers=_told_with(asked))


def _submit(
    server: Server, owner: str, sent: Mapping[str, Any], endpoint: Endpoint, once: Once | None
) -> tuple[Asked, Job]:
    """Check everything, and queue it."""
    asked = read_asked(sent, endpoint, lenient=server.options.lenient)
    worker = server.find(asked.model)
    order = order_of(asked, endpoint, worker.model, worker.pipe, server.bounds)
    return asked, server.submit(owner, order, once=once, **terms_of(asked.terms))


def _told_with(asked: Asked) -> dict[str, str]:
    """Headers of an answer. Names of fields are anyone's text, which a header could not have as it is."""
    named = [quote(name[:80]) for name in asked.ignored[:_MOST_NAMED]]
    return {IGNORED: ", ".join(named)} if named else {}


def _leave(server: Server, job: Job) -> None:
    """The caller has gone. A job that has ended stays as it is."""
    with suppress(UnknownJobError, GoneError):
        server.jobs.cancel(job.id, job.owner, "disconnect")


# ── an answer at once ──────────────────────────────────────────────────────────────────────────────


def _answer(server: Server, job: Job, host: str | None) -> bytes:
    """The body, with links on `host`, or without one with the pictures themselves."""
    indexes = sorted(picture.index for picture in job.pictures)
    pictures = [server.jobs.picture(job.id, job.owner, index) for index in indexes]
    data: list[dict[str, Any]] = []
    for picture in pictures:
        link = Linked(owner=job.owner, name=job.id, index=picture.index).path
        shown = {"url": f"{host}{link}{_SUFFIXES[picture.media_type]}"} if host else _as_base64(picture)
        data.append({**shown, "latentrt": _made(picture)})
    first = pictures[0]
    told: dict[str, Any] = {
        "created": int(job.created),
        "model": job.submission.model,
        "background": "opaque",
        "output_format": _KINDS[first.media_type],
        "size": _size_of(first),
        "latentrt": {"job": job.id, "asked": job.submission.work.pictures},
        "data": data,
    }
    return json.dumps(told).encode()


def _as_base64(picture: StoredPicture) -> dict[str, str]:
    return {"b64_json": base64.b64encode(picture.data).decode("ascii")}


def _size_of(picture: StoredPicture) -> str:
    file = examine(picture.data, "picture")
    return f"{file.width}x{file.height}"


def _made(picture: StoredPicture) -> dict[str, Any]:
    """How a picture was made; clients keep what they do not know."""
    return {
        "index": picture.index,
        "seed": picture.seed,
        "sha256": picture.sha256,
        "parameters": picture.made,
        "infotext": picture.infotext,
        "seconds": picture.seconds,
    }


# ── a stream ───────────────────────────────────────────────────────────────────────────────────────


class _Watched(StreamingResponse):
    """A stream of events. However it ends, also before its first event, `leaving` is called."""

    def __init__(
        self, events: AsyncGenerator[bytes], leaving: Callable[[], None], headers: Mapping[str, str]
    ) -> None:
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={**headers, "cache-control": "no-store", "x-accel-buffering": "no"},
        )
        self._leaving = leaving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leaving()


async def _stream(server: Server, job: Job, endpoint: Endpoint) -> AsyncGenerator[bytes]:
    """Partial images as they come, each finished picture, and at last perhaps an error."""
    partials, sent = Counter[int](), set[int]()
    async for reading in readings(job.log, 0, PING_S):
        if reading is None:
            yield b": ping\n\n"
            continue
        for kind, data in _news(reading):
            if kind == "preview":
                yield _event(_partial(job, endpoint, data, partials))
            elif kind == "image" and data["index"] not in sent:
                sent.add(data["index"])
                yield await run_in_threadpool(_completed, server, job, endpoint, data["index"])
            elif kind in ("failed", "cancelled"):
                yield _event(error_form(_not_completed(server.jobs.get(job.id, job.owner))), "error")


def _news(reading: Reading) -> Iterator[tuple[str, Data]]:
    """Events, also those pictures of a snapshot that a slow reader has missed."""
    if reading.snapshot is not None:
        for data in reading.snapshot.images:
            yield "image", data
    for event in reading.events:
        yield event.kind, event.data


def _event(told: Mapping[str, Any], kind: str | None = None) -> bytes:
    return f"event: {kind or told['type']}\ndata: {json.dumps(told)}\n\n".encode()


def _partial(job: Job, endpoint: Endpoint, data: Data, partials: Counter[int]) -> dict[str, Any]:
    """A picture on the way. Its file is smaller than the finished one's: `output_format` says what it is."""
    index, work = data["picture"], job.submission.work
    partials[index] += 1
    return {
        "type": f"{endpoint.event}.partial_image",
        "b64_json": data["b64"],
        "partial_image_index": partials[index] - 1,
        "created_at": int(job.created),
        "size": f"{work.width}x{work.height}",
        "quality": "auto",
        "background": "opaque",
        "output_format": _KINDS[data["media_type"]],
        "latentrt": {"index": index, "step": data["step"]},
    }


def _completed(server: Server, job: Job, endpoint: Endpoint, index: int) -> bytes:
    picture = server.jobs.picture(job.id, job.owner, index)
    return _event(
        {
            "type": f"{endpoint.event}.completed",
            **_as_base64(picture),
            "created_at": int(job.created),
            "size": _size_of(picture),
            "quality": "auto",
            "background": "opaque",
            "output_format": _KINDS[picture.media_type],
            "usage": _USAGE,
            "model": job.submission.model,
            "latentrt": {"job": job.id, **_made(picture)},
        }
    )


# Readers of streams rely on it; nothing is counted in tokens here.
_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
