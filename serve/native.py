"""The server's own API: jobs that are asked for, watched, cancelled and fetched.

POST   /v1/jobs                     202 and the job; with `Prefer: wait=N` the ended job if it takes no longer
GET    /v1/jobs                     the caller's
GET    /v1/jobs/{id}
DELETE /v1/jobs/{id}                cancel, as POST /v1/jobs/{id}/cancel
GET    /v1/jobs/{id}/events         server-sent events; after Last-Event-ID
GET    /v1/jobs/{id}/images/{i}     a picture's bytes
GET    /v1/capabilities             models, their fields as JSON Schema, and bounds
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Mapping
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse

from ..engines.errors import UsageError
from .answers import Answer
from .door.guard import KEY_ID
from .fields import TERMS, body_of, read_order, schema_of, terms_of
from .jobs.job import Job, Once, StoredPicture
from .reading import once_of, read_fields
from .server import Server
from .waiting import ended, readings

PING_S = 15.0  # proxies close what is silent for longer
RETRY_MS = 2000
LONGEST_WAIT_S = 60.0
MOST_LISTED = 100
# RFC 7240: preferences in any case, with values that may be quoted, perhaps in several headers.
_WAIT = re.compile(r'(?:^|,)\s*wait\s*=\s*("?)(\d+)\1\s*(?=[,;]|$)', re.IGNORECASE)

PREFIXES = ("/v1/jobs", "/v1/capabilities")
router = APIRouter(prefix="/v1", tags=["jobs"])


def server_of(request: Request) -> Server:
    """The server that the application was made for."""
    server: Server = request.app.state.server
    return server


def owner_of(request: Request) -> str:
    """Whose key the guard has seen."""
    return str(request.scope[KEY_ID])


@router.post("/jobs", status_code=202)
async def submit(request: Request) -> Response:
    """Take a job in. Its body is JSON, or a form whose files are the pictures."""
    server, owner = server_of(request), owner_of(request)
    sent, body = await read_fields(request)
    once = once_of(request, body)
    job = await run_in_threadpool(_submit, server, owner, sent, once)
    headers = {"location": f"/v1/jobs/{job.id}"}
    if wait := _WAIT.search(",".join(request.headers.getlist("prefer"))):
        seconds = min(float(wait[2]), LONGEST_WAIT_S)
        headers["preference-applied"] = f"wait={seconds:g}"
        job = await ended(server.jobs, job, seconds)
    status = 200 if job.ended is not None else 202
    return JSONResponse(record(server, job), status, headers=headers)


def _submit(server: Server, owner: str, sent: Mapping[str, Any], once: Once | None) -> Job:
    model = sent.get("model")
    if model is not None and not isinstance(model, str):
        raise UsageError(f"model is {model!r:.80}", expected="a name", fix="Change model.")
    worker = server.find(model)
    fields = {name: value for name, value in sent.items() if name not in ("model", *TERMS)}
    order = read_order(fields, worker.model, worker.pipe, server.bounds)
    return server.submit(owner, order, once=once, **terms_of(sent))


@router.get("/jobs")
async def listed(request: Request, limit: int = 20) -> Response:
    """The caller's jobs, the newest first."""
    server = server_of(request)
    found = server.jobs.owned(owner_of(request), max(1, min(limit, MOST_LISTED)))
    return JSONResponse({"jobs": [record(server, job) for job in found]})


@router.get("/jobs/{name}")
async def one(request: Request, name: str) -> Response:
    """A job as it is now."""
    server = server_of(request)
    return JSONResponse(record(server, server.jobs.get(name, owner_of(request))))


@router.delete("/jobs/{name}")
@router.post("/jobs/{name}/cancel")
async def cancel(request: Request, name: str) -> Response:
    """Want no more of a job: it ends within a step. One that has ended stays as it is."""
    server = server_of(request)
    return JSONResponse(record(server, server.jobs.cancel(name, owner_of(request))))


@router.get("/jobs/{name}/images/{index}")
async def image(request: Request, name: str, index: int) -> Response:
    """A finished picture's file."""
    picture = server_of(request).jobs.picture(name, owner_of(request), index)
    headers = {"etag": f'"{picture.sha256}"', "cache-control": "private, max-age=31536000, immutable"}
    if request.headers.get("if-none-match") == headers["etag"]:
        return Response(status_code=304, headers=headers)
    return Response(picture.data, media_type=picture.media_type, headers=headers)


@router.get("/jobs/{name}/events")
async def events(request: Request, name: str) -> Response:
    """What happens to a job, as server-sent events whose ids count up."""
    job = server_of(request).jobs.get(name, owner_of(request))
    last = request.headers.get("last-event-id", "")
    number = int(last) if last.isascii() and last.isdigit() and len(last) < 10 else 0
    return StreamingResponse(
        _stream(job, number),
        media_type="text/event-stream",
        headers={"cache-control": "no-store", "x-accel-buffering": "no"},
    )


async def _stream(job: Job, number: int) -> AsyncGenerator[bytes]:
    yield f"retry: {RETRY_MS}\n\n".encode()
    async for reading in readings(job.log, number, PING_S):
        if reading is None:
            yield b": ping\n\n"
            continue
        if reading.snapshot is not None:
            yield _sent(reading.snapshot.number, "snapshot", asdict(reading.snapshot))
        for event in reading.events:
            yield _sent(event.number, event.kind, event.data)


def _sent(number: int, kind: str, data: Mapping[str, Any]) -> bytes:
    return f"id: {number}\nevent: {kind}\ndata: {json.dumps(data)}\n\n".encode()


@router.get("/capabilities")
async def capabilities(request: Request) -> Response:
    """What may be asked for: the models, the fields that each has a use for, and the bounds."""
    server = server_of(request)
    models = {
        name: {
            "name": worker.pipe.package.manifest.name,
            "sha256": worker.pipe.package.manifest.sha256,
            "loras": list(worker.pipe.adapters.all_names()),
            "controls": worker.pipe.controls.kinds,
            "embeddings": list(worker.pipe.embeddings.names()),
            "rows": worker.rows,
            "schema": schema_of(worker.pipe, server.bounds),
            "defaults": worker.defaults,
        }
        for name, worker in server.workers.items()
    }
    return JSONResponse({"default": server.models[0], "models": models, "bounds": asdict(server.bounds)})


def bodies(server: Server) -> dict[str, Any]:
    """Bodies of requests for the OpenAPI document: what a model's jobs have, and what all jobs have."""
    of_all = {
        "model": {"type": "string", "description": f"One of {', '.join(server.models)}."},
        **TERMS,
    }
    schemas = [schema_of(worker.pipe, server.bounds) for worker in server.workers.values()]
    whole = [{**schema, "properties": {**schema["properties"], **of_all}} for schema in schemas]
    return {"/v1/jobs": body_of(whole, ("application/json",))}


def error_form(answer: Answer) -> dict[str, Any]:
    """An error in the form of this API."""
    return {"error": {**answer.failure.record(), "code": answer.code}}


# ── what is told of a job ──────────────────────────────────────────────────────────────────────────


def record(server: Server, job: Job) -> dict[str, Any]:
    """A job as JSON."""
    place = server.queue.place(job.id) if job.state == "queued" else None
    href = f"/v1/jobs/{job.id}"
    return {
        "id": job.id,
        "status": job.state,
        "model": job.submission.model,
        "created": job.created,
        "started": job.started,
        "ended": job.ended,
        "queue_position": place.position if place else None,
        "eta_s": place.eta_s if place else None,
        "images": [_picture(href, picture) for picture in job.pictures],
        "error": None if job.error is None else job.error.record(),
        "cancel_reason": job.cancel_reason,
        "links": {"self": href, "events": f"{href}/events", "cancel": f"{href}/cancel"},
    }


def _picture(href: str, picture: StoredPicture) -> dict[str, Any]:
    made = picture.made
    return {
        **picture.record(),
        "width": made.get("width"),
        "height": made.get("height"),
        "href": f"{href}/images/{picture.index}",
        "parameters": made,
        "infotext": picture.infotext,
        "seconds": picture.seconds,
    }
