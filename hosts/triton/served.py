"""What runs inside Triton: its Python backend hands requests over, the server's worker draws them together.

A request is answered by responses as they come (Triton calls it decoupled): previews, each finished picture,
and a last one. All draw in one process, side by side in shared calls of the UNet, so Triton's own batching
has nothing to do.

Source: `python_backend`, README and `src/resources/triton_python_backend_utils.py`, release 24.10.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, cast

import numpy as np
from PIL import Image

from ...engines.errors import LatentrtError, UsageError
from ...runtime.pipeline import Pipeline
from ...serve.fields import read_order, terms_of
from ...serve.jobs.bounds import Bounds
from ...serve.jobs.events import Event, Reading
from ...serve.jobs.failure import Failure, without_paths
from ...serve.jobs.job import ANYONE, Job
from ...serve.jobs.refusals import GoneError, RefusedError, UnknownJobError
from ...serve.server import Options, Server
from ...serve.waiting import readings
from .repository import INPUTS, PARAMETERS

LOOK_S = 0.05  # between two looks whether a client is still there
WATCH_S = 1.0  # between two looks at deadlines and the worker
GRACE_S = 30.0  # for jobs that are there when the model is unloaded


class Model:
    """One opened model in a Triton server.

    Args:
        args: as Triton's `initialize` has them.
        utils: the module `triton_python_backend_utils`, which there is inside Triton alone.
    """

    def __init__(self, args: Mapping[str, str], utils: Any) -> None:
        self._utils = utils
        given = json.loads(args["model_config"]).get("parameters", {})
        told = {name: given[name]["string_value"] for name in PARAMETERS if name in given}
        device = told.get("device", "auto")
        if device == "cuda":
            device = f"cuda:{args.get('model_instance_device_id', '0')}"
        self._name = args.get("model_name", "latentrt")
        self._pipe = Pipeline.open(
            told["model"],
            device=device,
            backend=told.get("backend", "auto"),
            loras=told.get("loras") or None,
        )
        bounds = Bounds(owner_share=1)  # whose requests they are, Triton does not say
        self._server = Server({self._name: self._pipe}, bounds, Options(rows=_number(told.get("rows"))))
        self._server.start()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="latentrt answers", daemon=True)
        self._thread.start()
        self._watching = asyncio.run_coroutine_threadsafe(self._watch(), self._loop)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            self._server.look()

    def take(self, requests: list[Any]) -> None:
        """Hand requests over. Each is answered through its own sender, also where it is refused."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                job = self._submit(request)
            except Exception as error:
                self._refuse(sender, error)
                continue
            asyncio.run_coroutine_threadsafe(self._answer(job, sender), self._loop)

    def end(self) -> None:
        """Let jobs end, and free everything."""
        self._server.end(GRACE_S)
        self._watching.cancel()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._pipe.close()

    # ── a request ──────────────────────────────────────────────────────────────────────────────────

    def _submit(self, request: Any) -> Job:
        sent = self._fields(request)
        terms = terms_of(sent)
        values = {name: value for name, value in sent.items() if name not in terms}
        order = read_order(values, self._name, self._pipe, self._server.bounds)
        return self._server.submit(ANYONE, order, **terms)

    def _fields(self, request: Any) -> dict[str, Any]:
        """Fields of the server's own jobs: of the input "fields", of parameters, and the other inputs."""
        tensors = {
            name: tensor.as_numpy()
            for name in INPUTS
            if (tensor := self._utils.get_input_tensor_by_name(request, name)) is not None
        }
        texts = {
            name: _text(name, tensors[name]) for name in ("prompt", "negative_prompt") if name in tensors
        }
        pictures = {
            name: _picture(name, tensors[name]) for name in ("image", "mask_image") if name in tensors
        }
        try:
            written: Any = (
                json.loads(_text("fields", tensors["fields"]) or "{}") if "fields" in tensors else {}
            )
        except (ValueError, RecursionError):
            written = None
        if not isinstance(written, dict):
            raise UsageError(
                "fields is no object", expected='{"seed": 7}', fix="Send an object as JSON text."
            )
        parameters = json.loads(request.parameters() or "{}")
        parameters.pop("id", None)  # of the request, in Triton's `generate`; its HTTP server hands it over
        return _joined(cast("dict[str, Any]", written), parameters, texts, pictures)

    # ── its answers ────────────────────────────────────────────────────────────────────────────────

    async def _answer(self, job: Job, sender: Any) -> None:
        told = set[int]()
        try:
            async for reading in readings(job.log, 0, LOOK_S):
                if sender.is_cancelled():
                    self._leave(job)
                for kind, data in _news(reading):
                    if kind == "image" and data["index"] not in told:
                        told.add(data["index"])
                        self._send(sender, self._picture(job, data["index"]))
                    elif kind in ("queued", "step", "preview"):
                        self._send(sender, self._event(kind, data))
            self._last(job, sender)
        except Exception as error:  # a sender whose client has gone
            self._leave(job)
            with suppress(Exception):
                self._refuse(sender, error)

    def _last(self, job: Job, sender: Any) -> None:
        done = self._server.jobs.get(job.id, job.owner)
        final = self._utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        if done.state == "completed":
            sender.send(flags=final)
            return
        message = "the job was cancelled" if done.error is None else _sentence(done.error)
        code = self._utils.TritonError.CANCELLED if done.error is None else self._code(done.error.type)
        sender.send(self._error(message, code), flags=final)

    def _leave(self, job: Job) -> None:
        with suppress(UnknownJobError, GoneError):
            self._server.jobs.cancel(job.id, job.owner, "disconnect")

    def _picture(self, job: Job, index: int) -> Any:
        picture = self._server.jobs.picture(job.id, job.owner, index)
        pixels = np.asarray(Image.open(io.BytesIO(picture.data)).convert("RGB"))  # (H, W, 3)
        told = {
            "index": index,
            "seed": picture.seed,
            "sha256": picture.sha256,
            "media_type": picture.media_type,
            "b64": base64.b64encode(picture.data).decode("ascii"),
            "infotext": picture.infotext,
        }
        return self._event("image", told, pixels)

    def _event(self, kind: str, data: Mapping[str, Any], pixels: Any = None) -> Any:
        text = np.array([json.dumps({"event": kind, **data})], dtype=object)
        empty = np.zeros((0, 0, 3), np.uint8)
        tensors = [
            self._utils.Tensor("event", text),
            self._utils.Tensor("image", empty if pixels is None else pixels),
        ]
        return self._utils.InferenceResponse(output_tensors=tensors)

    def _send(self, sender: Any, response: Any) -> None:
        if not sender.is_cancelled():
            sender.send(response)

    # ── errors ─────────────────────────────────────────────────────────────────────────────────────

    def _refuse(self, sender: Any, error: Exception) -> None:
        failure = Failure.of(error)
        kind = "refused" if isinstance(error, RefusedError) else failure.type
        code = self._code(kind, usage=isinstance(error, LatentrtError))
        response = self._error(_sentence(failure), code)
        sender.send(response, flags=self._utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _error(self, message: str, code: Any) -> Any:
        return self._utils.InferenceResponse(error=self._utils.TritonError(without_paths(message), code))

    def _code(self, kind: str, *, usage: bool = True) -> Any:
        error = self._utils.TritonError
        if kind in ("refused", "deadline", "memory_limit", "storage"):
            return error.UNAVAILABLE
        if kind in ("internal", "numeric") or not usage:
            return error.INTERNAL
        return error.INVALID_ARG


def _joined(*places: Mapping[str, Any]) -> dict[str, Any]:
    """One of several objects. Raises UsageError for a name that two of them have: one would be ignored."""
    found = dict[str, Any]()
    for place in places:
        for name in found.keys() & place.keys():
            raise UsageError(
                f"{name} is sent twice",
                expected="an input, a parameter, or a name in fields",
                fix=f"Leave one {name} out.",
            )
        found |= place
    return found


def _news(reading: Reading | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Events, also those pictures of a snapshot that were missed."""
    if reading is None:
        return
    if reading.snapshot is not None:
        for data in reading.snapshot.images:
            yield "image", data
    events: tuple[Event, ...] = reading.events
    for event in events:
        yield event.kind, event.data


def _sentence(failure: Failure) -> str:
    return f"{failure.found}; expected {failure.expected}. {failure.fix}"


def _number(text: str | None) -> int | None:
    return int(text) if text else None


def _text(name: str, tensor: Any) -> str:
    """The one text of a BYTES tensor."""
    values = tensor.reshape(-1)
    if values.size != 1:
        raise UsageError(f"{name} has {values.size} texts", expected="one", fix=f"Send one {name}.")
    value = values[0]
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name} is not UTF-8", expected="text as UTF-8", fix=f"Encode {name} so."
        ) from error


def _picture(name: str, tensor: Any) -> bytes:
    """A file of (H, W) or (H, W, 1, 3 or 4) uint8, which goes the way of all pictures."""
    plain = tensor[..., 0] if tensor.ndim == 3 and tensor.shape[2] == 1 else tensor
    if plain.ndim not in (2, 3) or not plain.size or (plain.ndim == 3 and plain.shape[2] not in (3, 4)):
        raise UsageError(
            f"{name} is an array of {tensor.shape}",
            expected="(height, width, channels) with 1, 3 or 4 channels, or a mask's (height, width)",
            fix=f"Change {name}.",
        )
    image = Image.fromarray(np.ascontiguousarray(plain))
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=0)
    return file.getvalue()
