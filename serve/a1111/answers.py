"""Answers of txt2img, img2img, options and png-info, as AUTOMATIC1111's clients read them.

Source: `modules/api/models.py`, and `Processed.js` in `modules/processing.py`, release 1.10.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from ...engines.installed import latentrt_version
from ...runtime.pictures.infotext import NEGATIVE_PROMPT, PROMPT, parse_infotext
from ...runtime.pictures.write import read_metadata
from ...runtime.pipeline import Pipeline
from ..answers import Answer, told_as
from ..jobs.job import Job, StoredPicture
from ..pictures.exchange import picture_bytes
from ..worker import Worker
from .fields import FIELDS, THEIR_NAMES, Route
from .order import Wanted, title_of
from .tasks import stamp_of

_PICTURES = ("init_images", "mask")


def drawn(route: Route, wanted: Wanted, job: Job, worker: Worker) -> dict[str, Any]:
    """The answer to a request whose job has ended: bare base64, as clients split at the first comma."""
    pictures = sorted(job.pictures, key=lambda one: one.index)
    sent = pictures if wanted.values["send_images"] else []
    return {
        "images": [base64.b64encode(picture.data).decode("ascii") for picture in sent],
        "parameters": _echo(route, wanted),
        "info": json.dumps(_info(wanted, job, pictures, worker)),
    }


def _echo(route: Route, wanted: Wanted) -> dict[str, Any]:
    """All fields with their values; the pictures only where a client wants them back."""
    values = {name: wanted.values[name] for name in FIELDS[route]}
    if route == "img2img" and not values["include_init_images"]:
        values |= dict.fromkeys(_PICTURES)
    scripts: dict[str, Any] = {name: {"args": []} for name in values["alwayson_scripts"]}
    return {**values, "alwayson_scripts": scripts}


def _info(wanted: Wanted, job: Job, pictures: list[StoredPicture], worker: Worker) -> dict[str, Any]:
    values, manifest, count = wanted.values, worker.pipe.package.manifest, len(pictures)
    first = pictures[0].made if pictures else dict[str, Any]()
    seeds = [picture.seed for picture in pictures]
    return {
        "prompt": values["prompt"],
        "all_prompts": [values["prompt"]] * count,
        "negative_prompt": values["negative_prompt"],
        "all_negative_prompts": [values["negative_prompt"]] * count,
        "seed": seeds[0] if seeds else wanted.order.seeds[0],
        "all_seeds": seeds,
        "subseed": values["subseed"],
        "all_subseeds": [values["subseed"]] * count,
        "subseed_strength": values["subseed_strength"],
        "width": first.get("width", values["width"]),
        "height": first.get("height", values["height"]),
        "sampler_name": wanted.sampler.name,
        "cfg_scale": values["cfg_scale"],
        "steps": values["steps"],
        "batch_size": values["batch_size"],
        "restore_faces": values["restore_faces"],
        "face_restoration_model": None,
        "sd_model_name": worker.model,
        "sd_model_hash": manifest.sha256[:10],
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": values["seed_resize_from_w"],
        "seed_resize_from_h": values["seed_resize_from_h"],
        "denoising_strength": first.get("strength"),
        "extra_generation_params": {"Schedule type": wanted.sampler.schedule},
        "index_of_first_image": 0,
        "infotexts": [picture.infotext for picture in pictures],
        "styles": [],
        "job_timestamp": stamp_of(job),
        "clip_skip": wanted.settings["CLIP_stop_at_last_layers"],
        "is_using_inpainting_conditioning": bool(manifest.image_latents),
        "version": f"latentrt {latentrt_version()}",
        "ignored": list(wanted.ignored),
    }


def options_of(worker: Worker) -> dict[str, Any]:
    """What clients ask of the settings; the model is the only one that they can change."""
    return {
        "sd_model_checkpoint": title_of(worker),
        "sd_checkpoint_hash": worker.pipe.package.manifest.sha256,
        "sd_vae": "Automatic",
        "CLIP_stop_at_last_layers": 1,
        "samples_format": "png",
        "randn_source": "CPU",
        "live_previews_enable": True,
        "show_progress_every_n_steps": 5,
    }


def model_of(worker: Worker) -> dict[str, Any]:
    """A model as clients list it; its file is a name, and never a path."""
    sha256 = worker.pipe.package.manifest.sha256
    return {
        "title": title_of(worker),
        "model_name": worker.model,
        "hash": sha256[:10],
        "sha256": sha256,
        "filename": worker.model,
        "config": None,
    }


def loras_of(pipe: Pipeline) -> list[dict[str, Any]]:
    """The adapters that prompts may name."""
    return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in pipe.adapters.all_names()]


def embeddings_of(pipe: Pipeline) -> dict[str, Any]:
    """The embeddings that prompts may name; they are read when they are, so no more is known of them."""
    unknown = dict.fromkeys(("step", "sd_checkpoint", "sd_checkpoint_name", "shape", "vectors"))
    return {"loaded": {name: dict(unknown) for name in pipe.embeddings.names()}, "skipped": {}}


def png_info(sent: object) -> dict[str, Any]:
    """What a picture says of how it was made. Raises PictureError, PictureTooLargeError, UsageError."""
    metadata = read_metadata(picture_bytes(sent, "image"))
    text = metadata.parameters or ""
    record = {} if metadata.record is None else {"latentrt": json.dumps(metadata.record)}
    return {"info": text, "items": record, "parameters": _parameters(text) if text else {}}


def _parameters(text: str) -> dict[str, str]:
    """The fields of a text by the names that A1111 has for them."""
    fields = parse_infotext(text)
    found = {"Prompt": fields.pop(PROMPT), "Negative prompt": fields.pop(NEGATIVE_PROMPT), **fields}
    width, _, height = found.get("Size", "").partition("x")
    return {**found, "Size-1": width, "Size-2": height} if height else found


def error_form(answer: Answer) -> dict[str, Any]:
    """An error in the form of this API."""
    message, found = (told_as(text, THEIR_NAMES) for text in (answer.message, answer.failure.found))
    return {"error": answer.failure.type, "detail": message, "body": "", "errors": found}
