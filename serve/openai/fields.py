"""What OpenAI's fields mean here: an order of the server's own, and what is wanted of the answer.

Sources: OpenAI's API reference, "Images", and the types of its Python package 3.57. Parameters of a pipeline
are further fields, under their own names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Literal, cast

from PIL import Image

from ...engines.errors import UsageError
from ...runtime.pipeline import Pipeline
from ...runtime.request.parameters import PARAMETERS, VARIES, check_integer, nearest
from ..fields import LEFT_OUT, TERMS, read_order
from ..jobs.bounds import Bounds
from ..order import Order, Previews
from ..pictures.exchange import FORMATS, read_picture

MOST_PARTIAL_IMAGES = 3
# Without a meaning for these models; clients send them to every server.
WITHOUT_USE = frozenset(
    {"quality", "style", "moderation", "user", "safety_identifier", "input_fidelity", "complexity"}
)
# Our names of what OpenAI has names for: its own are taken, and stand in errors.
RENAMED = {"num_images_per_prompt": "n", "mask_image": "mask"}
_THEIRS = {**RENAMED, "output": "output_format", "preview": "partial_images"}
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
_OURS = frozenset(PARAMETERS) - LEFT_OUT - _THEIRS.keys() - {"image"} | {*TERMS}
_EVERYWHERE = frozenset(
    {
        *("model", "n", "size", "response_format", "output_format", "output_compression"),
        *("background", "stream", "partial_images"),
        *WITHOUT_USE,
        *_OURS,
    }
)


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One of the three ways to ask for pictures.

    Attributes:
        event: how the events of its streams begin.
        needed: fields without which it has nothing to do.
        known: all of its fields.
        varies: whether it is for models that vary a picture.
    """

    event: str
    needed: tuple[str, ...]
    known: frozenset[str]
    varies: bool = False


GENERATIONS = Endpoint(event="image_generation", needed=("prompt",), known=_EVERYWHERE | {"prompt"})
EDITS = Endpoint(
    event="image_edit",
    needed=("image", "prompt"),
    known=_EVERYWHERE | {"prompt", "image", "images", "mask"},
)
VARIATIONS = Endpoint(
    event="image_edit", needed=("image",), known=_EVERYWHERE | {"prompt", "image"}, varies=True
)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a body says.

    Attributes:
        model: a name; None is the default.
        fields: of the order, as `read_order` has them.
        mask: the picture whose transparent pixels are repainted, as it was sent.
        terms: fields of the job itself.
        response_format: how pictures are handed over.
        partial_images: of each picture of a stream; None where no stream is wanted.
        ignored: names of fields that change nothing.
    """

    model: str | None
    fields: Mapping[str, Any]
    mask: Any
    terms: Mapping[str, Any]
    response_format: Literal["b64_json", "url"]
    partial_images: int | None
    ignored: tuple[str, ...]


def read_asked(sent: Mapping[str, Any], endpoint: Endpoint, *, lenient: bool = False) -> Asked:
    """What is asked for. Values of parameters are checked by `order_of`, and where the order is submitted.

    Args:
        sent: fields as JSON has them; of a form, pictures are bytes.
        endpoint: where they were sent.
        lenient: whether unknown fields are ignored.

    Raises:
        UsageError: an unknown field, a missing one, or a value that has no meaning here.
    """
    values = {name: value for name, value in sent.items() if value is not None}
    ignored = _without_use(values, endpoint, lenient=lenient)
    if "images" in values:
        values["image"] = values.pop("images") if "image" not in values else [values["image"], None]
    for name in endpoint.needed:
        if name not in values:
            raise UsageError(
                f"{name} is missing", expected=f"the fields {', '.join(endpoint.needed)}", fix=f"Send {name}."
            )
    _refuse_background(values)
    response_format = _choice(values, "response_format", ("b64_json", "url"))
    partial_images = _partial_images(values, response_format)
    mask = _one_picture("mask", values.pop("mask", None))
    model = _model(values)
    drawn = {**_size(values), "output": _output(values)}
    terms = {name: values.pop(name) for name in TERMS if name in values}
    if "image" in values:
        values["image"] = _one_picture("image", values["image"])
    if "n" in values:
        values["num_images_per_prompt"] = values.pop("n")
    return Asked(
        model=model,
        fields={**values, **drawn},
        mask=mask,
        terms=terms,
        response_format=cast(Any, response_format),
        partial_images=partial_images,
        ignored=tuple(ignored),
    )


def order_of(asked: Asked, endpoint: Endpoint, model: str, pipe: Pipeline, bounds: Bounds) -> Order:
    """The order that is asked for, of a model that was found. Decodes pictures.

    Raises:
        UsageError, PictureError, PictureTooLargeError: as `read_order`, and for a mask that has no meaning.
    """
    if endpoint.varies and not VARIES.fits(pipe.package.manifest):
        raise UsageError(
            f"variations of an image by the model {model!r}",
            expected=f"a model with {VARIES.words}",
            fix="Post the image to v1/images/edits with a prompt, and no mask",
        )
    order = read_order(asked.fields, model, pipe, bounds)
    if asked.mask is not None:
        mask = read_mask(asked.mask, order.values["image"])
        order = replace(
            order,
            values={**order.values, "mask_image": mask},
            input_bytes=order.input_bytes + len(asked.mask),
        )
    if asked.partial_images:
        steps = len(pipe.request_of(order.of_picture(0)).schedule())
        every = max(1, ceil(steps / (asked.partial_images + 1)))
        order = replace(order, previews=Previews(every=every, kind="decoder"))
    return order


def read_mask(sent: Any, image: Image.Image) -> Image.Image:
    """OpenAI's mask as a pipeline takes it: what is fully transparent becomes white, and is repainted.

    Args:
        sent: base64, or the bytes of a file.
        image: what it is the mask of; the mask is of its size.

    Raises:
        UsageError: no transparency, or another size.
        PictureError, PictureTooLargeError: as `read_picture`.
    """
    mask = read_picture(sent, "mask")
    if mask.size != image.size:
        raise UsageError(
            f"mask has {mask.width} x {mask.height} pixels for an image of {image.width} x {image.height}",
            expected="the size of the image",
            fix="Make the mask of the image itself.",
        )
    repainted = _transparent(mask)
    if repainted is None or repainted.getbbox() is None:
        raise UsageError(
            "mask has no pixel that is fully transparent",
            expected="a PNG with an alpha channel, 0 where the image is to be repainted",
            fix="Erase in a copy of the image what is to be repainted, or leave mask out.",
        )
    return repainted


def _transparent(image: Image.Image) -> Image.Image | None:
    """White where the alpha is 0, else black; None without alpha."""
    if image.mode != "RGBA":
        return None
    return image.getchannel("A").point([255] + [0] * 255)


# ── fields ─────────────────────────────────────────────────────────────────────────────────────────


def _without_use(values: dict[str, Any], endpoint: Endpoint, *, lenient: bool) -> list[str]:
    """Take out what changes nothing. Raises UsageError for what is unknown, unless that is ignored too."""
    ignored = [name for name in values if name in WITHOUT_USE]
    for name in [name for name in values if name not in endpoint.known]:
        if not lenient:
            raise _unknown(name, endpoint)
        ignored.append(name)
    for name in ignored:
        del values[name]
    return ignored


def _unknown(name: str, endpoint: Endpoint) -> UsageError:
    if _THEIRS.get(name, name) in EDITS.known - endpoint.known:
        return UsageError(
            f"the field {name} is none of this path's",
            expected="a request to v1/images/edits",
            fix=f"Post it there, or leave {name} out.",
        )
    near = nearest(name, (*endpoint.known, *_THEIRS))
    near = _THEIRS.get(near or "", near)
    return UsageError(
        f"there is no field {name[:80]!r}",
        expected=repr(near) if near else "a field of OpenAI's, or a parameter of v1/capabilities",
        fix=f"Write {near}." if near else f"Leave {name[:80]} out, or start the server with --lenient",
    )


def _choice(values: dict[str, Any], name: str, names: tuple[str, ...]) -> str:
    """Take out one of several names; the first is the default."""
    value = values.pop(name, names[0])
    if value not in names:
        raise UsageError(
            f"{name} is {value!r:.80}", expected=f"one of {', '.join(names)}", fix=f"Change {name}."
        )
    return value


def _refuse_background(values: dict[str, Any]) -> None:
    """Pictures are opaque. Raises UsageError for others."""
    _choice(values, "background", ("auto", "opaque"))


def _model(values: dict[str, Any]) -> str | None:
    model = values.pop("model", None)
    if model is not None and not isinstance(model, str):
        raise UsageError(f"model is {model!r:.80}", expected="a name", fix="Change model.")
    return model or None


def _partial_images(values: dict[str, Any], response_format: str) -> int | None:
    stream = values.pop("stream", False)
    count = check_integer("partial_images", values.pop("partial_images", 0), 0, MOST_PARTIAL_IMAGES)
    if not isinstance(stream, bool):
        raise UsageError(f"stream is {stream!r:.80}", expected="true or false", fix="Change stream.")
    if count and not stream:
        raise UsageError(
            f"partial_images is {count}, without a stream", expected="stream: true", fix="Send stream too."
        )
    if stream and response_format == "url":
        raise UsageError(
            "response_format is url, in a stream",
            expected="b64_json, as events have it",
            fix="Leave response_format out.",
        )
    return count if stream else None


def _size(values: dict[str, Any]) -> dict[str, int]:
    """Take out the size; nothing for "auto", which is the picture's or the model's."""
    size = values.pop("size", "auto")
    if size == "auto":
        return {}
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if found is None:
        raise UsageError(
            f"size is {size!r:.80}", expected="WIDTHxHEIGHT, as 512x512, or auto", fix="Change size."
        )
    if other := {"width", "height", "upscale"} & values.keys():
        raise UsageError(
            f"size with {min(other)}", expected="one of them", fix=f"Leave one of size and {min(other)} out."
        )
    return {"width": int(found[1]), "height": int(found[2])}


def _output(values: dict[str, Any]) -> dict[str, Any]:
    """Take out format and compression, as the order has them."""
    kind = _choice(values, "output_format", (*FORMATS, "jpg"))
    if "output_compression" not in values:
        return {"format": kind}
    level = check_integer("output_compression", values.pop("output_compression"), 0, 100)
    if kind != "png":
        return {"format": kind, "quality": max(level, 1)}  # Pillow's lowest that has a meaning
    if level != 100:
        raise UsageError(
            f"output_compression is {level}, of png",
            expected="a level of jpeg or webp: png keeps every pixel as it is",
            fix="Leave output_compression out.",
        )
    return {"format": kind}


def _one_picture(name: str, value: Any) -> Any:
    """A picture's base64 or bytes: itself, in an object as {"image_url": …}, or the only one of a list."""
    several = cast("list[Any]", value) if isinstance(value, list) else [value]
    if len(several) != 1:
        raise UsageError(
            f"{name} has {len(several)} pictures", expected="one", fix=f"Send one {name} a request."
        )
    (one,) = several
    if isinstance(one, Mapping):
        one = cast("Mapping[str, Any]", one).get("image_url", one)
    if one is not None and not isinstance(one, (str, bytes)):
        raise UsageError(
            f"{name} is {one!r:.80}",
            expected="the file of a form, or base64 of it, bare or as a data URL",
            fix=f"Change {name}.",
        )
    return one
