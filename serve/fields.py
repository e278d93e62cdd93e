"""Fields of a request over a network: which a model has, what each may be, and the order that they make.

Names, ranges and help are those of `runtime.request.parameters`, so what a pipeline learns, every API has.
Where a parameter reads files, a field has the picture itself, or the name of something that was loaded when
the server started: no request names a path.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

from ..engines.errors import UsageError
from ..runtime.controls.control import Control, Mode
from ..runtime.controls.image_prompt import ImagePrompt
from ..runtime.controls.preparations import PREPARATIONS
from ..runtime.pipeline import Pipeline
from ..runtime.request.parameters import PARAMETERS, check_integer, check_loras
from ..runtime.sampling.samplers import SAMPLERS
from .jobs.bounds import Bounds
from .order import Order, Output, Previews, seeds_of
from .pictures.exchange import FORMATS, find_format, read_picture

LONGEST_TEXT = 32_000  # characters of a prompt
PICTURES = ("image", "mask_image")  # fields that are base64 text, or files of a form
# Fields of the job itself, no part of an order.
TERMS: Mapping[str, Mapping[str, Any]] = {
    "priority": {"type": "integer", "minimum": -10, "maximum": 10, "default": 0},
    "timeout_s": {"type": "number", "minimum": 0.001, "maximum": 86400},
}
# What a network has no form for: the output's is `output`, noise is the seed's, pictures are no latents, and
# no request names a file.
LEFT_OUT = frozenset({"output_type", "latents", "denoising_start", "table"})
_PICTURE = {"type": "string", "contentEncoding": "base64"}
_SEEDS = {"type": "integer", "minimum": -1, "maximum": 2**64 - 1}
_OUTPUT: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "format": {"type": "string", "enum": list(FORMATS), "default": "png"},
        "quality": {"type": "integer", "minimum": 1, "maximum": 100},
        "metadata": {"type": "boolean", "default": True},
    },
}
_PREVIEWS: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "every": {"type": "integer", "minimum": 1, "default": 1, "description": "Steps."},
        "kind": {"type": "string", "enum": ["fast", "decoder"], "default": "fast"},
    },
}


# ── what there is ──────────────────────────────────────────────────────────────────────────────────


def schema_of(pipe: Pipeline, bounds: Bounds) -> dict[str, Any]:
    """The JSON Schema of an order's fields for one model: those that it has a use for."""
    manifest = pipe.package.manifest
    properties: dict[str, Any] = {"prompt": {"type": "string", "maxLength": LONGEST_TEXT}}
    for name, parameter in PARAMETERS.items():
        if name in LEFT_OUT or (parameter.model is not None and not parameter.model.fits(manifest)):
            continue
        properties[name] = {**parameter.kind.schema(manifest), "description": parameter.help}
        if parameter.default is not None:
            properties[name]["default"] = parameter.default
    texts = ("negative_prompt", "prompt_2", "negative_prompt_2")
    own: dict[str, Any] = {
        **{name: {"type": "string", "maxLength": LONGEST_TEXT} for name in texts},
        "sampler": {"type": "string", "enum": list(SAMPLERS)},
        "seed": _SEEDS,
        "image": _PICTURE,
        "mask_image": _PICTURE,
        "num_inference_steps": {"maximum": bounds.request_steps},
        "num_images_per_prompt": {"type": "integer", "minimum": 1, "maximum": bounds.request_pictures},
        "loras": {"type": "array", "items": _lora_schema(pipe)},
        "controls": {"type": "array", "items": _control_schema(pipe)},
    }
    for name, schema in own.items():
        if name in properties:
            properties[name] |= schema
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {**properties, "output": _OUTPUT, "preview": _PREVIEWS},
        "dependentRequired": {
            name: list(needs)
            for name in properties
            if (needs := PARAMETERS[name].needs if name in PARAMETERS else ())
        },
        "allOf": [
            {"not": {"required": [name, other]}}
            for name in properties
            if name in PARAMETERS
            for other in PARAMETERS[name].excludes
            if other in properties
        ],
    }


def body_of(schemas: Sequence[Mapping[str, Any]], media_types: Sequence[str]) -> dict[str, Any]:
    """A body for the OpenAPI document: an object of one of so many schemas, one for each model."""
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": list(schemas)}
    return {"required": True, "content": {name: {"schema": schema} for name in media_types}}


def _lora_schema(pipe: Pipeline) -> dict[str, Any]:
    names = {"type": "string", "enum": list(pipe.adapters.all_names())}
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["name"],
        "properties": {"name": names, "strength": {"type": "number", "default": 1.0}},
    }


def _control_schema(pipe: Pipeline) -> dict[str, Any]:
    names = {"type": "string", "enum": list(pipe.controls.names)}
    share = {"type": "number", "minimum": 0, "maximum": 1}
    return {
        "type": "object",
        "required": ["model", "image"],
        "properties": {
            "model": names,
            "image": _PICTURE,
            "strength": {"type": "number", "default": 1.0},
            "start": {
                **share,
                "default": 0.0,
                "description": "The share of the steps that it comes in after.",
            },
            "end": {**share, "default": 1.0, "description": "The share of the steps that it stays until."},
            "mode": {"type": "string", "enum": list(get_args(Mode)), "default": "balanced"},
            "preparation": {
                "type": "string",
                "enum": list(PREPARATIONS),
                "description": "What makes a map of the picture; none where it is one.",
            },
        },
    }


# ── what was sent ──────────────────────────────────────────────────────────────────────────────────


def read_order(sent: Mapping[str, Any], model: str, pipe: Pipeline, bounds: Bounds) -> Order:
    """The order that fields make. Values of a model's parameters are checked where it is submitted.

    Args:
        sent: fields as JSON has them; of a form the pictures are bytes.
        model: the one that is to draw, and `pipe` its pipeline.
        bounds: `request_pictures` of them.

    Raises:
        UsageError: an unknown field, or one of an odd kind.
        PictureError, PictureTooLargeError: as `pictures.read_picture`.
    """
    values = {name: value for name, value in sent.items() if value is not None}
    for name in LEFT_OUT & values.keys():
        raise UsageError(
            f"the field {name}", expected="a parameter that requests have", fix=f"Leave {name} out."
        )
    for name in ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2"):
        if name in values:
            values[name] = _text(name, values[name])
    output, previews = _output(values.pop("output", {})), _previews(values.pop("preview", None))
    count = values.pop("num_images_per_prompt", 1)
    seed = values.pop("seed", None)
    if seed is not None:
        seed = check_integer("seed", seed, -1, 2**64 - 1)
    input_bytes = sum(len(values[name]) for name in PICTURES if isinstance(values.get(name), (str, bytes)))
    for name in PICTURES:
        if name in values:
            values[name] = read_picture(values[name], name)
    if "loras" in values:
        values["loras"] = _loras(values["loras"])
    if "controls" in values:
        input_bytes += sum(map(_size, _objects("controls", values["controls"])))
        values["controls"] = _controls(values["controls"], pipe)
    return Order(
        model=model,
        values={"prompt": "", **values},
        seeds=seeds_of(seed, check_integer("num_images_per_prompt", count, 1, bounds.request_pictures)),
        output=output,
        previews=previews,
        input_bytes=input_bytes,
    )


def terms_of(sent: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the job itself, as `Server.submit` takes them. Raises UsageError."""
    return {
        "priority": _number(sent, "priority") or 0,
        "timeout_s": _number(sent, "timeout_s"),
    }


def _number(sent: Mapping[str, Any], name: str) -> Any:
    value, schema = sent.get(name), TERMS[name]
    kinds = (int,) if schema["type"] == "integer" else (int, float)
    low, high = schema["minimum"], schema["maximum"]
    if value is None or (isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high):
        return value
    raise UsageError(f"{name} is {value!r:.80}", expected=f"{low:g} to {high:g}", fix=f"Change {name}.")


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or "\0" in value or len(value) > LONGEST_TEXT:
        raise UsageError(
            f"{name} is {value!r:.80}",
            expected=f"a text of at most {LONGEST_TEXT} characters, none of them NUL",
            fix=f"Change {name}.",
        )
    return value


def _object(name: str, value: object, known: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not set(cast("Mapping[str, Any]", value)) <= set(known):
        raise UsageError(
            f"{name} is {value!r:.80}",
            expected=f"an object with {', '.join(known)}",
            fix=f"Change {name}, or leave it out.",
        )
    return cast("Mapping[str, Any]", value)


def _objects(name: str, value: object) -> list[Any]:
    if not isinstance(value, list):
        raise UsageError(
            f"{name} is {value!r:.80}", expected="a list", fix=f"Change {name}, or leave it out."
        )
    return cast("list[Any]", value)


def _output(value: object) -> Output:
    given = _object("output", value, tuple(_OUTPUT["properties"]))
    quality, metadata = given.get("quality"), given.get("metadata", True)
    if not isinstance(metadata, bool):
        raise UsageError(f"metadata is {metadata!r:.80}", expected="true or false", fix="Change metadata.")
    kind = find_format(_text("format", given.get("format", "png"))).kind.lower()
    if quality is not None and kind == "png":  # else the file could not be written when it is drawn
        raise UsageError(
            f"quality is {quality!r:.80}, of png",
            expected="a quality of jpeg or webp: png keeps every pixel as it is",
            fix="Leave quality out.",
        )
    return Output(
        format=kind,
        quality=None if quality is None else check_integer("quality", quality, 1, 100),
        metadata=metadata,
    )


def _previews(value: object) -> Previews | None:
    if value is None:
        return None
    given = _object("preview", value, tuple(_PREVIEWS["properties"]))
    kind = given.get("kind", "fast")
    if kind not in ("fast", "decoder"):
        raise UsageError(
            f"the kind of previews is {kind!r:.80}", expected="fast or decoder", fix="Change it."
        )
    return Previews(every=check_integer("every", given.get("every", 1), 1, 1000), kind=kind)


def _loras(value: object) -> tuple[tuple[str, Any], ...]:
    """Names, [name, strength], or objects, as `Pipeline` takes them. An unknown name is refused there."""
    pairs: list[Any] = []
    for one in _objects("loras", value):
        if given := _mapping(one):
            given = _object("loras", given, ("name", "strength"))
            pairs.append((given.get("name"), given.get("strength", 1.0)))
        else:
            pairs.append(one)
    return check_loras(pairs)


def _mapping(value: object) -> Mapping[str, Any]:
    """An object of JSON; nothing of anything else, which is refused where it is read."""
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def _size(control: object) -> int:
    sent = _mapping(control)
    return sum(len(sent[name]) for name in PICTURES if isinstance(sent.get(name), (str, bytes)))


def _controls(value: object, pipe: Pipeline) -> list[Control | ImagePrompt]:
    kinds = pipe.controls.kinds
    found: list[Control | ImagePrompt] = []
    for one in _objects("controls", value):
        name = _mapping(one).get("model")
        kind = ImagePrompt if isinstance(name, str) and kinds.get(name) == "ip-adapter" else Control
        given = dict(_object("controls", one, [field.name for field in dataclasses.fields(kind)]))
        if not isinstance(name, str) or name not in kinds:
            raise UsageError(
                f"the model of a control is {name!r:.80}",
                expected=f"one of {', '.join(kinds)}"
                if kinds
                else "a server that was started with --control",
                fix="Use its name.",
            )
        if "image" not in given:
            raise UsageError("a control without image", expected="a picture", fix="Send it as base64.")
        for part in PICTURES:
            if given.get(part) is not None:
                given[part] = read_picture(given[part], f"{part} of controls")
        for part in ("mode", "preparation", "resize_mode", "control_type"):
            if given.get(part) is not None:
                _text(f"{part} of controls", given[part])
        if not isinstance(given.get("settings", {}), Mapping):
            raise UsageError(
                f"settings of controls is {given['settings']!r:.80}",
                expected="an object",
                fix="Change settings, or leave it out.",
            )
        found.append(kind(**given))
    return found
