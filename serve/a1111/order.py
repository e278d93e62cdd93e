"""A request of txt2img or img2img as an order of pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...engines.errors import UsageError
from ...runtime.pipeline import Pipeline
from ...runtime.request.parameters import check_integer, check_number
from ..jobs.job import Work
from ..order import Order, Output, Previews, check_work, seeds_of
from ..pictures.exchange import find_format
from ..server import Server
from ..worker import Worker
from .controlnet import read_units
from .fields import FIELDS, SETTINGS, Route, read_values
from .samplers import Chosen, choose
from .start import read_start

LATENT = "Latent"  # the one upscaler of a second pass
PREVIEW_EVERY = 5  # steps; there it is 10, of pictures that are drawn one by one
_HASH = re.compile(r" \[[0-9a-fA-F]+\]$")
_ETA = ("ddim", "tcd")  # spellings of samplers with as much noise as one likes
_NOISE = {"CPU": "torch-cpu", "GPU": "torch-cuda", "NV": "torch-cuda"}
_HR_LIKE_FIRST = {  # of a second pass: what may be chosen, but only as the first pass has it
    "hr_checkpoint_name": "Use same checkpoint",
    "hr_sampler_name": "Use same sampler",
    "hr_scheduler": "Use same scheduler",
    "hr_prompt": "",
    "hr_negative_prompt": "",
}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A request that was understood.

    Attributes:
        order: what is drawn.
        values: of all fields, for the answer.
        settings: those of `override_settings`.
        sampler: as A1111 calls it.
        ignored: names of what was sent and has no effect.
    """

    order: Order
    values: Mapping[str, Any]
    settings: Mapping[str, Any]
    sampler: Chosen
    ignored: tuple[str, ...]


def read_wanted(route: Route, sent: Mapping[str, Any], server: Server, model: str | None) -> Wanted:
    """What is asked for. Values of a model's parameters are checked where it is submitted.

    Args:
        route: whose fields these are.
        sent: as JSON has them.
        server: has the models.
        model: the one that the caller has chosen before; a request may name another.

    Raises:
        FieldError: a field of another kind, a script.
        UsageError: what is not carried out; UnknownModelError, PictureError, …
    """
    values, ignored = read_values(sent, FIELDS[route])
    settings, more = read_values(values["override_settings"], SETTINGS, "override_settings.")
    worker = find_model(server, settings["sd_model_checkpoint"] or model)
    image = values["init_images"][0] if values.get("init_images") else None
    controls, control_bytes, left = read_units(values["alwayson_scripts"], worker.pipe, image)
    sampler = choose(
        values["sampler_name"] or values["sampler_index"] or "Euler", values["scheduler"] or None
    )
    parameters, unused = _parameters(values, settings, sampler)
    if controls:
        parameters["controls"] = tuple(controls)
    if route == "img2img":
        parameters |= read_start(values)
    own = [*values.get("init_images", ()), values.get("mask")]
    order = Order(
        model=worker.model,
        values=parameters,
        seeds=_seeds(values, server.bounds.request_pictures),
        output=Output(format=find_format(settings["samples_format"]).kind.lower()),
        previews=_previews(worker.pipe),
        input_bytes=control_bytes + sum(len(one) for one in own if isinstance(one, str)),
        enlarged=_second_pass(values, sampler, worker, server) if values.get("enable_hr") else None,
    )
    return Wanted(
        order=order,
        values=values,
        settings=settings,
        sampler=sampler,
        ignored=(*ignored, *more, *left, *unused),
    )


def find_model(server: Server, title: str | None) -> Worker:
    """The worker of a model by its name, or its title, which has a hash in brackets behind the name."""
    return server.find(title if title in server.models or not title else _HASH.sub("", title))


def title_of(worker: Worker) -> str:
    """What clients show of a model, and send back to choose it."""
    return f"{worker.model} [{worker.pipe.package.manifest.sha256[:10]}]"


def _parameters(
    values: Mapping[str, Any], settings: Mapping[str, Any], sampler: Chosen
) -> tuple[dict[str, Any], list[str]]:
    """Those of a pipeline, and the names of what this sampler has no use for."""
    last = check_integer("CLIP_stop_at_last_layers", settings["CLIP_stop_at_last_layers"], 1, 12)
    if settings["randn_source"] not in _NOISE:
        raise UsageError(
            f"randn_source is {settings['randn_source']!r:.80}",
            expected=f"one of {', '.join(_NOISE)}",
            fix="Use one of these.",
        )
    parameters = {
        "prompt": values["prompt"],
        "negative_prompt": values["negative_prompt"] or None,
        "width": values["width"],
        "height": values["height"],
        "num_inference_steps": values["steps"],
        "guidance_scale": values["cfg_scale"],
        "sampler": sampler.spelling,
        "rng": _NOISE[settings["randn_source"]],
        **({"clip_skip": last - 1} if last > 1 else {}),
    }
    if values["eta"] is not None and sampler.name.lower() in _ETA:
        parameters["eta"] = values["eta"]
    unused = values["eta"] is not None and "eta" not in parameters
    return parameters, ["eta"] if unused else []


def _seeds(values: Mapping[str, Any], most: int) -> tuple[int, ...]:
    count = 1
    for name in ("n_iter", "batch_size"):
        count *= check_integer(name, values[name], 1, most)
    check_integer("n_iter * batch_size", count, 1, most)
    return seeds_of(check_integer("seed", values["seed"], -1, 2**64 - 1), count)


def _previews(pipe: Pipeline) -> Previews | None:
    """Pictures on the way where they cost little."""
    manifest = pipe.package.manifest
    cheap = manifest.latent_rgb or "preview_decoder" in manifest.nets
    return Previews(every=PREVIEW_EVERY) if cheap else None


# ── the second pass ────────────────────────────────────────────────────────────────────────────────


def _second_pass(
    values: Mapping[str, Any], sampler: Chosen, worker: Worker, server: Server
) -> dict[str, Any]:
    """What `enable_hr` changes for it. Raises UsageError, TooLargeError."""
    if values["hr_upscaler"] != LATENT:
        raise UsageError(
            f"hr_upscaler is {values['hr_upscaler']!r:.80}", expected=repr(LATENT), fix=f"Use {LATENT}."
        )
    same = {
        "hr_sampler_name": sampler.name,
        "hr_scheduler": sampler.schedule,
        "hr_prompt": values["prompt"],
        "hr_negative_prompt": values["negative_prompt"],
    }
    for name, word in _HR_LIKE_FIRST.items():
        if (values[name] or word) not in (word, same.get(name), values.get(name.removeprefix("hr_"))):
            raise UsageError(
                f"{name} is {values[name]!r:.80}",
                expected="the same as of the first pass",
                fix=f"Leave {name} out.",
            )
    width, height = _enlarged_size(values, worker.pipe.package.manifest.size_multiple)
    check_work(Work(width=width, height=height, steps=1), server.bounds)
    steps = values["hr_second_pass_steps"] or values["steps"]
    return {
        "width": width,
        "height": height,
        "strength": values["denoising_strength"],
        "num_inference_steps": steps,
    }


def _enlarged_size(values: Mapping[str, Any], step: int) -> tuple[int, int]:
    """Width and height: so many times as large, or as asked, a side alone at the same aspect ratio."""
    sides = {"width": values["hr_resize_x"], "height": values["hr_resize_y"]}
    for name, side in sides.items():
        check_integer(name, values[name], 1, 2**16)
        check_integer("hr_resize_x" if name == "width" else "hr_resize_y", side, 0, 2**16)
    scale = check_number("hr_scale", values["hr_scale"], 1.0, 4.0)
    given = {name: side / values[name] for name, side in sides.items() if side}
    if len(given) == 2 and abs(given["width"] / given["height"] - 1) > 0.02:
        raise UsageError(
            f"hr_resize_x and hr_resize_y are {sides['width']} x {sides['height']}",
            expected=f"the aspect ratio of {values['width']} x {values['height']}",
            fix="Send one of them, or hr_scale.",
        )
    factor = next(iter(given.values()), scale)
    width, height = (
        (sides[name] or int(values[name] * factor)) // step * step for name in ("width", "height")
    )
    return width, height
