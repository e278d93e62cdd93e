"""Units of AUTOMATIC1111's extension for ControlNet, as controls of a request.

Source: sd-webui-controlnet, `scripts/external_code.py` and `internal_controlnet/args.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from ...engines.errors import UsageError
from ...runtime.controls.control import Control
from ...runtime.controls.image_prompt import ImagePrompt
from ...runtime.controls.preparations import find_preparation
from ...runtime.pipeline import Pipeline
from ..jobs.refusals import FieldError
from ..pictures.exchange import read_picture
from .fields import Field, odd, read_flag, read_list, read_number, read_object, read_text, read_values

SCRIPT = "controlnet"
VERSION = 3  # of its API
# What its words mean here; each may be said by its number, too.
_MODES = {
    "Balanced": "balanced",
    "My prompt is more important": "prompt",
    "ControlNet is more important": "control",
}
_RESIZES = {"Just Resize": "stretch", "Crop and Resize": "crop", "Resize and Fill": "pad"}
# Its preparations -> ours, and the settings that its two thresholds are.
MODULES: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "none": (None, ()),
    "canny": ("canny", ("low", "high")),
    "invert": ("invert", ()),
    "invert (from white bg & black line)": ("invert", ()),
    "threshold": ("threshold", ("level",)),
    "blur_gaussian": ("blur", ("sigma",)),
    "tile_resample": ("tile", ("rate",)),
    "shuffle": ("shuffle", ()),
    "inpaint": ("inpaint", ()),
    "inpaint_only": ("inpaint", ()),
    "inpaint_global_harmonious": ("inpaint", ()),
}


def _word(name: str, value: Any) -> str:
    """A word or its number."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise odd(name, value, "a name")
    return str(value)


def _picture(name: str, value: Any) -> Any:
    """Base64, or an object of a picture and its mask; an empty text is none."""
    if not isinstance(value, (str, dict)):
        raise odd(name, value, "one picture as base64 text")
    return cast("str | dict[str, Any]", value) or None


# fmt: off
UNIT: Mapping[str, Field] = {
    "enabled": Field(read=read_flag, default=True),
    "module": Field(read=read_text, default="none"),
    "model": Field(read=read_text, default="None"),
    "weight": Field(read=read_number, default=1.0),
    "image": Field(read=_picture),
    "input_image": Field(read=_picture),  # its older name
    "mask": Field(read=_picture),
    "mask_image": Field(read=_picture),
    "resize_mode": Field(read=_word, default="Crop and Resize"),
    "threshold_a": Field(read=read_number, default=-1.0),
    "threshold_b": Field(read=read_number, default=-1.0),
    "guidance_start": Field(read=read_number, default=0.0),
    "guidance_end": Field(read=read_number, default=1.0),
    "control_mode": Field(read=_word, default="Balanced"),
    # What says how a picture is prepared: here always at the size that is drawn.
    "low_vram": Field(read=read_flag, default=False),
    "lowvram": Field(read=read_flag, default=False),
    "pixel_perfect": Field(read=read_flag, default=False),
    "processor_res": Field(read=read_number, default=-1.0),
    "hr_option": Field(read=read_text, default="Both", use="refused", neutral=("HiResFixOption.BOTH",)),
}
# fmt: on


def read_units(
    scripts: Mapping[str, Any], pipe: Pipeline, image: Any
) -> tuple[list[Control | ImagePrompt], int, tuple[str, ...]]:
    """The controls of `alwayson_scripts`, the bytes of their pictures, and what of them has no effect.

    Args:
        scripts: by name; those other than ControlNet's are refused unless they have nothing to do.
        pipe: has the nets.
        image: of img2img, as it was sent, for units without one; None for txt2img.

    Raises:
        FieldError: another script, or a value of another kind.
        UsageError: a net that is not there, a unit without a picture, or a word that is unknown.
    """
    found: list[Control | ImagePrompt] = []
    size, ignored = 0, list[str]()
    for script, sent in scripts.items():
        units = read_list(f"args of {script[:40]}", read_object(script[:40], sent).get("args") or [])
        if script.lower() != SCRIPT:
            _refuse_script(script, units)
            continue
        for number, unit in enumerate(units):
            place = f"controlnet.{number}."
            values, left = read_values(read_object(place.rstrip("."), unit), UNIT, place)
            ignored += left
            if values["enabled"]:
                control, length = _control(values, place, pipe, image)
                found.append(control)
                size += length
    return found, size, tuple(ignored)


def _refuse_script(script: str, units: list[Any]) -> None:
    if not any(units):  # what clients send that know of it and do not want it: no args, or one false
        return
    raise FieldError(
        f"alwayson_scripts has {script!r:.80}", expected="ControlNet alone", fix=f"Leave {script!r:.80} out."
    )


def _control(
    values: Mapping[str, Any], place: str, pipe: Pipeline, image: Any
) -> tuple[Control | ImagePrompt, int]:
    name = _model(values["model"], pipe)
    picture = values["image"] or values["input_image"] or image
    mask = values["mask"] or values["mask_image"]
    if isinstance(picture, dict):
        parts = cast("dict[str, Any]", picture)
        picture, mask = parts.get("image"), parts.get("mask") or mask
    if picture is None:
        raise UsageError(f"{place}image is missing", expected="a picture", fix="Send it as base64.")
    size = sum(len(one) for one in (picture, mask) if isinstance(one, str))
    shared: dict[str, Any] = {
        "model": name,
        "image": read_picture(picture, f"{place}image"),
        "mask_image": None if mask is None else read_picture(mask, f"{place}mask"),
        "strength": values["weight"],
        "start": values["guidance_start"],
        "end": values["guidance_end"],
    }
    if pipe.controls.kinds[name] == "ip-adapter":  # whose module is its image encoder
        return ImagePrompt(**shared), size
    preparation, settings = _preparation(values)
    if preparation != "inpaint":
        del shared["mask_image"]  # others have no use for it, there as here
    return Control(
        **shared,
        preparation=preparation,
        settings=settings,
        mode=_meaning(f"{place}control_mode", values["control_mode"], _MODES),
        resize_mode=_meaning(f"{place}resize_mode", values["resize_mode"], _RESIZES),
    ), size


def _model(sent: str, pipe: Pipeline) -> str:
    """A net's name, which clients send with its hash in brackets."""
    names = pipe.controls.names
    for name in (sent, sent.rpartition(" [")[0]):
        if name in names:
            return name
    raise UsageError(
        f"the model of a control is {sent!r:.80}",
        expected=f"one of {', '.join(names)}" if names else "a server that was started with --control",
        fix="Use its name.",
    )


def _preparation(values: Mapping[str, Any]) -> tuple[str | None, dict[str, float]]:
    """What makes the hint; a threshold below 0 stands for the usual one. Raises UsageError."""
    module = values["module"].lower()
    preparation, names = MODULES.get(module, (values["module"], ()))
    given = zip(names, (values["threshold_a"], values["threshold_b"]), strict=False)
    settings = {name: value for name, value in given if value >= 0}
    find_preparation(preparation).check(settings)
    return preparation, settings


def _meaning(name: str, sent: str, words: Mapping[str, str]) -> Any:
    by_word = {word.lower(): ours for word, ours in words.items()}
    by_number = {str(number): ours for number, ours in enumerate(words.values())}
    ours = by_number.get(sent) or by_word.get(sent.lower())
    if ours is None:
        raise UsageError(
            f"{name} is {sent!r:.80}", expected=f"one of {', '.join(words)}", fix="Use one of these."
        )
    return ours
