"""AUTOMATIC1111's API, as far as there is something behind it.

What it has and this server has not is answered as its clients can bear: lists are empty, services say 501.

Source: `modules/api/api.py` and `modules/progress.py`, release 1.10.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from ...engines.errors import CancelledError
from ...engines.installed import latentrt_version
from ...runtime.doctor import memory as read_memory
from ..answers import answer_to_failure
from ..jobs.job import Job
from ..jobs.refusals import UnsupportedError
from ..native import owner_of, server_of
from ..reading import read_fields
from ..server import Server
from ..waiting import ended, unless_gone
from ..worker import Worker
from . import answers
from .controlnet import MODULES, SCRIPT, VERSION
from .fields import API, Field, Route, read_flag, read_text, read_values, read_whole
from .order import LATENT, Wanted, find_model, read_wanted
from .samplers import sampler_list, schedule_list
from .tasks import Desk, job_of, progress_of, task_progress

_INTERNAL, _CONTROLNET = "/internal", "/controlnet"
PREFIXES = (f"{API}/", f"{_INTERNAL}/", f"{_CONTROLNET}/")
_CLOSED = 499  # for the log alone: the client is gone
error_form = answers.error_form

router = APIRouter(tags=["AUTOMATIC1111"])


def _desk(request: Request) -> Desk:
    """What is kept of an application's callers."""
    state = request.app.state
    if not hasattr(state, "a1111"):
        state.a1111 = Desk()
    desk: Desk = state.a1111
    return desk


def _worker(request: Request) -> Worker:
    """That of the model which the caller has chosen, or of the default."""
    return server_of(request).find(_desk(request).chosen.get(owner_of(request)))


# ── drawing ────────────────────────────────────────────────────────────────────────────────────────


@router.post(f"{API}/txt2img")
async def txt2img(request: Request) -> Response:
    """Draw from a prompt."""
    return await _draw("txt2img", request)


@router.post(f"{API}/img2img")
async def img2img(request: Request) -> Response:
    """Draw from a picture, or what a mask shows of it."""
    return await _draw("img2img", request)


async def _draw(route: Route, request: Request) -> Response:
    server, owner, desk = server_of(request), owner_of(request), _desk(request)
    sent, _ = await read_fields(request)
    wanted, job = await run_in_threadpool(_submit, server, owner, route, sent, desk.chosen.get(owner))
    with desk.waiting(owner, job.id, wanted.values["force_task_id"]):
        done = await unless_gone(
            request.receive,
            ended(server.jobs, job),
            lambda: server.jobs.cancel(job.id, owner, "disconnect"),
        )
    if done is None:
        return Response(status_code=_CLOSED)
    return await run_in_threadpool(_answer, server, route, wanted, done)


def _submit(
    server: Server, owner: str, route: Route, sent: Mapping[str, Any], model: str | None
) -> tuple[Wanted, Job]:
    wanted = read_wanted(route, sent, server, model)
    return wanted, server.submit(owner, wanted.order)


def _answer(server: Server, route: Route, wanted: Wanted, job: Job) -> Response:
    """An interrupted job's answer has the pictures that were finished, and no others."""
    if job.error is not None:
        answer = answer_to_failure(job.error)
        return JSONResponse(error_form(answer), answer.status, headers=answer.headers)
    if job.state == "cancelled" and job.cancel_reason != "request":
        raise CancelledError("the job was cancelled", expected="a server that goes on", fix="Send it again.")
    for picture in job.pictures:  # they may now give room to those that nobody has fetched
        server.jobs.picture(job.id, job.owner, picture.index)
    return JSONResponse(answers.drawn(route, wanted, job, server.find(wanted.order.model)))


@router.get(f"{API}/progress")
async def progress(request: Request, skip_current_image: bool = False) -> Response:
    """How far the caller's current job is."""
    server = server_of(request)
    job = _desk(request).current(server, owner_of(request))
    return JSONResponse(progress_of(server, job, picture=not skip_current_image))


@router.post(f"{API}/interrupt")
async def interrupt(request: Request) -> Response:
    """End the caller's current job; finished pictures of it are answered."""
    _interrupt(request)
    return JSONResponse({})


@router.post(f"{API}/skip")
async def skip(request: Request) -> Response:
    """Do the same: pictures of one request are drawn side by side."""
    _interrupt(request)
    return JSONResponse(None)


def _interrupt(request: Request) -> None:
    server, owner = server_of(request), owner_of(request)
    if (job := _desk(request).current(server, owner)) is not None:
        server.jobs.cancel(job.id, owner)


_PROGRESS: Mapping[str, Field] = {
    "id_task": Field(read=read_text, default=""),
    "id_live_preview": Field(read=read_whole, default=-1),
    "live_preview": Field(read=read_flag, default=True),
}


@router.post(f"{_INTERNAL}/progress")
async def progress_of_task(request: Request) -> Response:
    """How far the task is that a request has named by `force_task_id`."""
    values, _ = read_values((await read_fields(request))[0], _PROGRESS)
    answer = task_progress(
        server_of(request),
        _desk(request),
        owner_of(request),
        values["id_task"],
        seen=values["id_live_preview"],
        picture=values["live_preview"],
    )
    return JSONResponse(answer)


@router.get(f"{_INTERNAL}/pending-tasks")
async def pending(request: Request) -> Response:
    """The caller's tasks that wait."""
    server = server_of(request)
    tasks = [(task.name, job_of(server, task)) for task in _desk(request).of(owner_of(request))]
    names = [name for name, job in tasks if job is not None and job.state == "queued"]
    return JSONResponse({"size": len(names), "tasks": names})


# ── settings and pictures ──────────────────────────────────────────────────────────────────────────


@router.get(f"{API}/options")
async def options(request: Request) -> Response:
    """The settings, as far as clients ask for them."""
    return JSONResponse(answers.options_of(_worker(request)))


_OPTIONS: Mapping[str, Field] = {"sd_model_checkpoint": Field(read=read_text)}


@router.post(f"{API}/options")
async def choose(request: Request) -> Response:
    """Choose the caller's model. All else is left as it is, as clients send back whatever they got."""
    values, _ = read_values((await read_fields(request))[0], _OPTIONS)
    if title := values["sd_model_checkpoint"]:
        _desk(request).chosen[owner_of(request)] = find_model(server_of(request), title).model
    return JSONResponse(None)


@router.post(f"{API}/png-info")
async def png_info(request: Request) -> Response:
    """What a picture says of how it was made."""
    sent, _ = await read_fields(request)
    return JSONResponse(await run_in_threadpool(answers.png_info, sent.get("image")))


# ── what there is ──────────────────────────────────────────────────────────────────────────────────


@router.get(f"{API}/sd-models")
async def models(request: Request) -> Response:
    """The models."""
    return JSONResponse([answers.model_of(worker) for worker in server_of(request).workers.values()])


@router.get(f"{API}/loras")
async def loras(request: Request) -> Response:
    """The adapters of the caller's model."""
    return JSONResponse(await run_in_threadpool(answers.loras_of, _worker(request).pipe))


@router.get(f"{API}/embeddings")
async def embeddings(request: Request) -> Response:
    """The embeddings of the caller's model."""
    return JSONResponse(await run_in_threadpool(answers.embeddings_of, _worker(request).pipe))


@router.get(f"{API}/scripts")
async def scripts(request: Request) -> Response:
    """The scripts that a request may have: ControlNet's, where there are controls."""
    names = [SCRIPT] if _worker(request).pipe.controls.names else []
    return JSONResponse({"txt2img": names, "img2img": names})


@router.get(f"{_CONTROLNET}/version")
async def controlnet_version() -> Response:
    """That of the extension whose units are understood."""
    return JSONResponse({"version": VERSION})


@router.get(f"{_CONTROLNET}/model_list")
async def controlnet_models(request: Request) -> Response:
    """The nets that units may name."""
    return JSONResponse({"model_list": list(_worker(request).pipe.controls.names)})


@router.get(f"{_CONTROLNET}/module_list")
async def controlnet_modules() -> Response:
    """The preparations that units may name."""
    return JSONResponse({"module_list": list(MODULES)})


@router.get(f"{API}/memory")
async def memory() -> Response:
    """The machine's memory in bytes, where its system tells; nothing is measured of a device."""
    found = await run_in_threadpool(read_memory)
    total, free = found["total"], found["available"]
    used = None if total is None or free is None else total - free
    ram = {"total": total, "free": free, "used": used}
    return JSONResponse({"ram": ram, "cuda": {"error": "not measured"}})


_NO_UPSCALER = dict.fromkeys(("model_name", "model_path", "model_url"))
_LISTS: Mapping[str, Any] = {
    "samplers": sampler_list(),
    "schedulers": schedule_list(),
    "upscalers": [{"name": name, **_NO_UPSCALER, "scale": 4.0} for name in ("None", LATENT)],
    "latent-upscale-modes": [{"name": LATENT}],
    "version": {"app": "latentrt", "version": latentrt_version(), "updated": "", "hash": ""},
    "cmd-flags": {},
    **{name: [] for name in ("sd-vae", "sd-modules", "hypernetworks", "face-restorers")},
    **{name: [] for name in ("realesrgan-models", "prompt-styles", "script-info", "extensions")},
}
_NOTHING_TO_DO = (
    *("refresh-checkpoints", "refresh-vae", "refresh-loras", "refresh-embeddings"),
    *("unload-checkpoint", "reload-checkpoint"),
)
_NOT_HERE = (
    *("interrogate", "extra-single-image", "extra-batch-images"),
    *("create/embedding", "create/hypernetwork", "train/embedding", "train/hypernetwork"),
)


def _answering(value: object) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return JSONResponse(value)

    return answer


def _refusing(name: str) -> Callable[[], Awaitable[Response]]:
    async def refuse() -> Response:
        raise UnsupportedError(
            f"{name} is not offered here", expected="txt2img or img2img", fix="Use another server for it."
        )

    return refuse


def _add_routes() -> None:
    for name, value in _LISTS.items():
        router.add_api_route(f"{API}/{name}", _answering(value), methods=["GET"], description="A list.")
    for name in _NOTHING_TO_DO:
        nothing = "What is served was loaded at the start, and stays."
        router.add_api_route(f"{API}/{name}", _answering(None), methods=["POST"], description=nothing)
    for name in _NOT_HERE:
        router.add_api_route(
            f"{API}/{name}",
            _refusing(name),
            methods=["POST"],
            description="There is none of it here.",
            responses={501: {"description": "Always."}},
        )


_add_routes()
