"""The record of how a picture was made: a request as values in its file, and such values as parameters.

Our own record has every parameter by its name, so that it can be passed again; pictures that it started from
are in it as their names and hashes. AUTOMATIC1111's text has what that program would need to draw the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, cast

from ..engines.errors import UsageError
from ..engines.noise_schedule import NoiseSchedule
from .embeddings import Called, called_by, read_hashes, write_hashes, written_name
from .pictures.infotext import NEGATIVE_PROMPT, PROMPT, Value
from .prompts.lora_tags import tag_text
from .request.inputs import INPUTS
from .request.parameters import PARAMETERS
from .request.request import Request
from .request.source import Masked
from .sampling.a1111 import a1111_fields, spelled_by_a1111
from .sampling.config import SamplerConfig

LORA_HASHES = "Lora hashes"
STEERED_BY = "steered_by"  # the controls of a picture, in its record
BEGAN_AS = "began_as"  # of a picture in two: what its first one had other values of
_LORA_HASH = re.compile(r"([^,:]+?): *([0-9a-fA-F]+)(?:, *|$)")
# Of the call, not of one of its pictures.
_OF_THE_CALL = ("num_images_per_prompt", "output_type")
_TI_HASHES = "TI hashes"  # AUTOMATIC1111's name of the embeddings that the texts call
# Brackets have a meaning in AUTOMATIC1111's prompts alone; behind a backslash they are text.
_BRACKETS = {
    "plain": re.compile(r"[()\[\]\\]"),
    "comfyui": re.compile(r"[\[\]]"),
    "a1111": re.compile(r"(?!)"),
}


# ── written ────────────────────────────────────────────────────────────────────────────────────────


def make_record(request: Request, index: int, producer: Mapping[str, Any]) -> dict[str, Any]:
    """How picture `index` was made, as JSON: `producer`, and every parameter that is not its default.

    `image`, `mask_image`, `latents` and `table` are {"name", "sha256"} (`request.inputs.Input`); other values
    can be passed again as they are. `mask_region` is the part of the picture that was drawn, `embeddings` has
    {"name", "sha256"} of those that its texts call, and "adapter", the name of the one that brought it along.
    `steered_by` has the controls: net, sha256, {"name", "sha256"} of its pictures, and how much it counts.
    """
    masked = request.source if isinstance(request.source, Masked) else None
    record: dict[str, Any] = {
        "prompt": request.prompts[index],
        "negative_prompt": request.negative_prompts[index],
        "prompt_syntax": request.prompt_syntax,
        "seed": request.seeds[index],
        "rng": request.rng,
        "sampler": _sampler_record(request.sampler) if request.table is None else request.table.name,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "guidance_rescale": request.guidance_rescale,
        "height": request.height,
        "width": request.width,
    }
    some = {
        "prompt_2": request.prompts_2[index],
        "negative_prompt_2": request.negative_prompts_2[index],
        "strength": _strength(request),
        "draw_tile": request.draw_tile,
        "draw_overlap": request.draw_overlap,
        "mask_region": masked.inpainting.region if masked else None,
        "embeddings": [one.to_json() for one in called_by(request, index)] or None,
        # Several pictures per input stand one after another: the first input's, then the second's.
        **{
            name: found[index * len(found) // len(request.seeds)].to_json()
            for name, found in request.inputs.items()
        },
    }
    record |= {name: value for name, value in some.items() if value is not None}
    record |= {
        name: value
        for name, value in request.chosen.items()
        if name not in (*record, *_OF_THE_CALL, "loras", "controls")  # which `producer` has
    }
    record |= producer
    if STEERED_BY in producer:
        record[STEERED_BY] = [_of_picture(one, index, len(request.seeds)) for one in producer[STEERED_BY]]
    return record


def _of_picture(control: Mapping[str, Any], index: int, count: int) -> dict[str, Any]:
    """A control as one of `count` pictures has it: what reads one for each prompt has read its own."""
    if control["kind"] == "ip-adapter":  # every picture sees all of them
        return dict(control)
    read = {name: found for name in ("images", "masks") if (found := control.get(name))}
    return {**control, **{name: [found[index * len(found) // count]] for name, found in read.items()}}


def a1111_parameters(request: Request, index: int, producer: Mapping[str, Any]) -> dict[str, Value]:
    """The same under AUTOMATIC1111's names, for `infotext.format_infotext`.

    Prompts are written so that it reads what was drawn: where brackets were text, they are escaped, and
    adapters that were passed are in it as tags, as far as a tag can say their strengths.
    """
    escaped = _BRACKETS[request.prompt_syntax]

    def written(prompt: str | None) -> str:
        return escaped.sub(r"\\\g<0>", prompt or "")

    tags = [tag for name, strength in producer.get("loras", ()) if (tag := tag_text(name, strength))]
    masked = request.source if isinstance(request.source, Masked) else None
    first = producer.get(BEGAN_AS)
    size = f"{request.width}x{request.height}"
    return {
        PROMPT: " ".join(filter(None, (written(request.prompts[index]), *tags))),
        NEGATIVE_PROMPT: written(request.negative_prompts[index]),
        "Steps": first["num_inference_steps"] if first else request.num_inference_steps,
        **_sampler_text(request),
        "CFG scale": _one_weight(request.guidance_scale),
        "Seed": request.seeds[index],
        "Size": f"{first['width']}x{first['height']}" if first else size,
        "Model": producer.get("base") or producer["model"],
        "Denoising strength": _strength(request),
        "Hires resize": size if first else None,
        "Hires steps": request.num_inference_steps if first else None,
        "Hires upscaler": "Latent" if first else None,
        "Mask blur": (masked.inpainting.blur or None) if masked else None,
        "Clip skip": request.clip_skip + 1,  # 1 is the last layer there
        _TI_HASHES: write_hashes(called_by(request, index)),
        "RNG": "CPU" if request.rng == "torch-cpu" else "GPU",
        "Refiner": producer["model"] if "base" in producer else None,
        "Refiner switch at": producer.get("handed over at"),
        LORA_HASHES: _lora_hashes(producer.get("adapters", {})),
        **{f"ControlNet {n}": _control_text(one) for n, one in enumerate(producer.get(STEERED_BY, ()))},
        "Version": f"latentrt {producer['latentrt']}",
    }


def _sampler_text(request: Request) -> Mapping[str, Value]:
    if request.table is not None:
        return {"Sampler": request.table.name, "Schedule type": "table"}
    custom = request.timesteps is not None or request.sigmas is not None
    return a1111_fields(request.sampler, request.num_inference_steps, custom=custom)


def _lora_hashes(adapters: Mapping[str, Mapping[str, str]]) -> str | None:
    """As AUTOMATIC1111's extension for LoRA writes them (extensions-builtin/Lora/scripts/lora_script.py)."""
    pairs = (f"{written_name(name)}: {facts['short_hash']}" for name, facts in adapters.items())
    return ", ".join(pairs) or None


# As sd-webui-controlnet spells them in its infotext (scripts/infotext.py, internal_controlnet/args.py).
_CONTROL_MODES = {
    "balanced": "Balanced",
    "prompt": "My prompt is more important",
    "control": "ControlNet is more important",
}
_RESIZE_MODES = {"stretch": "Just Resize", "crop": "Crop and Resize", "pad": "Resize and Fill"}


def _control_text(control: Mapping[str, Any]) -> str:
    """One control, as AUTOMATIC1111's extension writes it; diffusers' "guess" has no name there."""
    usual = "ip-adapter" if control["kind"] == "ip-adapter" else "none"
    values = {
        "Module": control.get("preparation", usual),
        "Model": f"{written_name(control['model'])} [{control['sha256'][:8]}]",
        "Weight": _one_weight(control["strength"]),
        "Resize Mode": _RESIZE_MODES.get(control.get("resize_mode", "")),
        "Threshold A": control.get("settings", {}).get("low"),
        "Threshold B": control.get("settings", {}).get("high"),
        "Guidance Start": control["start"],
        "Guidance End": control["end"],
        "Pixel Perfect": True,
        "Control Mode": _CONTROL_MODES.get(control.get("mode", "")),
    }
    return ", ".join(f"{name}: {value}" for name, value in values.items() if value is not None)


def _strength(request: Request) -> float | None:
    """The strength of what the run started from; a latent that another model left has none."""
    return None if request.denoising_start is not None else request.strength


def _sampler_record(config: SamplerConfig) -> dict[str, Any]:
    """Name, diffusers class, and all that differs from our defaults, of the noise schedule too."""
    options = {name: value for name, value in _not_default(config).items() if name != "noise"}
    noise = _not_default(config.noise)
    return {"name": config.name, "scheduler": config.scheduler, "eta": config.eta, **options, "noise": noise}


def _not_default(instance: SamplerConfig | NoiseSchedule) -> dict[str, Any]:
    values = {item.name: (getattr(instance, item.name), item.default) for item in fields(instance)}
    return {name: value for name, (value, default) in values.items() if value != default}


# ── read ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A picture's parameters, as a pipeline takes them.

    Attributes:
        prompt: what was drawn.
        parameters: keyword arguments.
        inputs: the hashes of pictures that must be passed as well, by parameter.
        adapters: the hashes of the adapters that it was drawn with, by name.
        embeddings: those that its texts called; hashes of another program are cut.
        left: what the record has besides, one "name: value" each.
    """

    prompt: str
    parameters: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, str]]
    adapters: Mapping[str, str] = field(default_factory=dict[str, str])
    embeddings: tuple[Called, ...] = ()
    left: tuple[str, ...] = ()


def read_record(record: Mapping[str, Any]) -> Recorded:
    """The parameters of our own record."""
    found = {name: record[name] for name in PARAMETERS if record.get(name) is not None}
    if {"timesteps", "sigmas", "table"} & found.keys():
        found.pop("num_inference_steps", None)  # as many as there are levels, or rows
    if "table" in found:
        found.pop("sampler", None)
    if "upscale" in found:
        found = {name: value for name, value in found.items() if name not in ("height", "width")}
    inputs = {name: found.pop(name) for name in INPUTS if name in found}
    embeddings = cast("list[dict[str, str]]", record.get("embeddings") or [])
    wrong = [name for name, value in inputs.items() if not _is_input(value)]
    wrong += [] if _are_called(embeddings) else ["embeddings"]
    wrong += [] if isinstance(record.get("prompt"), str) else ["prompt"]
    if wrong:
        raise UsageError(
            f"the record's {wrong[0]} is {record.get(wrong[0])!r:.80}",
            expected="a prompt, and inputs and embeddings with their sha256: a record that latentrt wrote",
            fix="Pass prompt and parameters instead.",
        )
    called = tuple(
        Called(name=one["name"], sha256=one["sha256"], adapter=str(one.get("adapter", "")))
        for one in embeddings
    )
    return Recorded(
        prompt=record["prompt"],
        parameters=found,
        inputs=inputs,
        adapters=_recorded_adapters(record),
        embeddings=called,
    )


def _recorded_adapters(record: Mapping[str, Any]) -> dict[str, str]:
    """The sha256 of each adapter of our own record. Raises UsageError for what is none."""
    found = record.get("adapters", {})
    try:
        return {str(name): str(facts["sha256"]) for name, facts in found.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise UsageError(
            f"the record's adapters are {found!r:.80}",
            expected="adapters with their sha256: a record that latentrt wrote",
            fix="Pass prompt and parameters instead.",
        ) from error


def _are_called(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    return all(_is_input(one) and "name" in one for one in cast("list[Any]", value))


def _is_input(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    facts = cast("Mapping[str, Any]", value)
    return isinstance(facts.get("sha256"), str) and isinstance(facts.get("name", ""), str)


_RNG = {"CPU": "torch-cpu", "GPU": "torch-cuda", "NV": "torch-cuda"}
_EMPHASIS = {"Original": "a1111", "None": "plain"}


def _size(text: str) -> dict[str, Any]:
    width, height = text.split("x")
    return {"width": int(width), "height": int(height)}


# AUTOMATIC1111's names -> parameters. Any ValueError or KeyError means that a value is not carried over.
_READERS: Mapping[str, Callable[[str], dict[str, Any]]] = {
    "Steps": lambda text: {"num_inference_steps": int(text)},
    "CFG scale": lambda text: {"guidance_scale": float(text)},
    "Seed": lambda text: {"seed": int(text)},
    "Size": _size,
    "Clip skip": lambda text: {"clip_skip": int(text) - 1},
    "RNG": lambda text: {"rng": _RNG[text]},
    "Emphasis": lambda text: {"prompt_syntax": _EMPHASIS[text]},
    "Eta DDIM": lambda text: {"eta": float(text)},
    "Denoising strength": lambda text: {"strength": float(text)},
    "Mask blur": lambda text: {"mask_blur": float(text)},
}
# Beside an input picture only; texts have them too where a picture was enlarged.
_WITH = {"Denoising strength": "image", "Mask blur": "mask_image"}
_READ_WITH_SAMPLER = ("Sampler", "Schedule type", "UniPC variant", "UniPC order", "Version")


def read_a1111(text: Mapping[str, str], inputs: tuple[str, ...] = ()) -> Recorded:
    """The parameters of AUTOMATIC1111's text (`infotext.parse_infotext`), as far as they mean anything here.

    `inputs` are the parameters of INPUTS that the caller passes as well.
    """
    parameters: dict[str, Any] = {"negative_prompt": text[NEGATIVE_PROMPT]} if text[NEGATIVE_PROMPT] else {}
    left: list[str] = []
    hashes = dict(_LORA_HASH.findall(text.get(LORA_HASHES, "")))
    embeddings: tuple[Called, ...] = ()
    if "Sampler" in text:
        parameters["sampler"] = spelled_by_a1111(text)
    for name, value in text.items():
        if name in (PROMPT, NEGATIVE_PROMPT, LORA_HASHES, *_READ_WITH_SAMPLER):
            continue
        try:
            if _WITH.get(name, "") not in ("", *inputs):
                raise ValueError(name)
            if name == _TI_HASHES:
                embeddings = read_hashes(value)
            else:
                parameters |= _READERS[name](value)
        except (ValueError, KeyError):
            left.append(f"{name}: {value}")
    return Recorded(
        prompt=text[PROMPT],
        parameters=parameters,
        inputs={},
        adapters=hashes,
        embeddings=embeddings,
        left=tuple(left),
    )


def _one_weight(strength: Any) -> Any:
    """A number; strengths of blocks, and scales of steps, have no place there."""
    return None if isinstance(strength, (Mapping, tuple)) else strength
