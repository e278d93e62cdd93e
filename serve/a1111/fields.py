"""Fields of AUTOMATIC1111's txt2img and img2img, declared once: names, defaults, kinds, and their use here.

Source: `modules/api/models.py`, `modules/processing.py` and `modules/shared_options.py`, release 1.10.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from ...engines.errors import UsageError
from ..fields import LONGEST_TEXT
from ..jobs.refusals import FieldError

Route = Literal["txt2img", "img2img"]
API = "/sdapi/v1"  # how paths begin
# Our names of parameters, as errors have them -> the fields that they are read from.
THEIR_NAMES: Mapping[str, str] = {
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "num_images_per_prompt": "batch_size",
    "mask_image": "mask",
    "padding_mask_crop": "inpaint_full_res_padding",
    "clip_skip": "CLIP_stop_at_last_layers",
}
_MOST_TOLD = 50  # names of unknown fields in an answer


# ── kinds ──────────────────────────────────────────────────────────────────────────────────────────


def odd(name: str, value: object, expected: str) -> FieldError:
    """The error for a value of another kind."""
    return FieldError(f"{name} is {value!r:.80}", expected=expected, fix=f"Change {name}, or leave it out.")


def read_whole(name: str, value: Any) -> int:
    """A whole number, which some clients send as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value % 1 != 0:
        raise odd(name, value, "a whole number")
    return int(value)


def read_number(name: str, value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        raise odd(name, value, "a number")
    return float(value)


def read_text(name: str, value: Any) -> str:
    """A text that is not too long."""
    if not isinstance(value, str) or "\0" in value or len(value) > LONGEST_TEXT:
        raise odd(name, value, f"a text of at most {LONGEST_TEXT} characters, none of them NUL")
    return value


def read_flag(name: str, value: Any) -> bool:
    """A bool, which some clients send as 0 or 1."""
    if not isinstance(value, (bool, int)) or value not in (0, 1):
        raise odd(name, value, "true or false")
    return bool(value)


def read_names(name: str, value: Any) -> tuple[str, ...]:
    """Texts without those that stand for none."""
    found = read_list(name, value)
    if not all(isinstance(one, str) for one in found):
        raise odd(name, found, "a list of texts")
    return tuple(one for one in found if one not in ("", "None"))


def read_object(name: str, value: Any) -> dict[str, Any]:
    """An object of JSON."""
    if not isinstance(value, dict):
        raise odd(name, value, "an object")
    return cast("dict[str, Any]", value)


def read_list(name: str, value: Any) -> list[Any]:
    """A list of JSON."""
    if not isinstance(value, list):
        raise odd(name, value, "a list")
    return cast("list[Any]", value)


def read_picture(name: str, value: Any) -> str:
    """Base64; what is in it is looked at where it is read."""
    if not isinstance(value, str):
        raise odd(name, value, "one picture as base64 text")
    return value


def read_anything(name: str, value: Any) -> Any:
    """What is refused whatever it is."""
    return value


# ── declarations ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field. One that is null counts as left out, as clients send null for what they do not choose.

    Attributes:
        read: (name, what was sent) -> its value. Raises FieldError.
        default: where it is left out.
        use: "used" has an effect, or needs none; "listed" has none here, which the answer says of it;
            "refused" would be a lie if it were ignored.
        neutral: values, besides the default, that ask for nothing.
    """

    read: Callable[[str, Any], Any]
    default: Any = None
    use: Literal["used", "listed", "refused"] = "used"
    neutral: tuple[Any, ...] = ()

    def says_nothing(self, value: Any) -> bool:
        """Whether a value asks for nothing."""
        return value in (self.default, *self.neutral)


# fmt: off
_BOTH: dict[str, Field] = {
    "prompt": Field(read=read_text, default=""),
    "negative_prompt": Field(read=read_text, default=""),
    "styles": Field(read=read_names, default=(), use="refused"),
    "seed": Field(read=read_whole, default=-1),
    "subseed": Field(read=read_whole, default=-1),
    "subseed_strength": Field(read=read_number, default=0.0, use="refused"),
    "seed_resize_from_h": Field(read=read_whole, default=-1, use="refused", neutral=(0,)),
    "seed_resize_from_w": Field(read=read_whole, default=-1, use="refused", neutral=(0,)),
    "sampler_name": Field(read=read_text),
    "sampler_index": Field(read=read_text, default="Euler"),
    "scheduler": Field(read=read_text),
    "batch_size": Field(read=read_whole, default=1),
    "n_iter": Field(read=read_whole, default=1),
    "steps": Field(read=read_whole, default=50),
    "cfg_scale": Field(read=read_number, default=7.0),
    "width": Field(read=read_whole, default=512),
    "height": Field(read=read_whole, default=512),
    "restore_faces": Field(read=read_flag, default=False, use="refused"),
    "tiling": Field(read=read_flag, default=False, use="refused"),
    "do_not_save_samples": Field(read=read_flag, default=False),  # nothing is ever saved
    "do_not_save_grid": Field(read=read_flag, default=False),
    "save_images": Field(read=read_flag, default=False, use="listed"),
    "send_images": Field(read=read_flag, default=True),
    "eta": Field(read=read_number),
    "s_min_uncond": Field(read=read_number, default=0.0, use="listed"),
    "s_churn": Field(read=read_number, default=0.0, use="listed"),
    "s_tmax": Field(read=read_number, default=0.0, use="listed"),
    "s_tmin": Field(read=read_number, default=0.0, use="listed"),
    "s_noise": Field(read=read_number, default=1.0, use="listed"),
    "override_settings": Field(read=read_object, default={}),
    # Settings are those of one request, always.
    "override_settings_restore_afterwards": Field(read=read_flag, default=True, use="listed"),
    "refiner_checkpoint": Field(read=read_text, use="refused", neutral=("", "None")),
    "refiner_switch_at": Field(read=read_number),  # of a refiner, which there is none of
    "disable_extra_networks": Field(read=read_flag, default=False, use="refused"),
    "firstpass_image": Field(read=read_picture, use="refused", neutral=("",)),
    "comments": Field(read=read_object, default={}, use="listed"),
    "script_name": Field(read=read_text, neutral=("", "None"), use="refused"),
    "script_args": Field(read=read_list, default=[]),
    "alwayson_scripts": Field(read=read_object, default={}),
    "force_task_id": Field(read=read_text),
    "infotext": Field(read=read_text, use="refused", neutral=("",)),
}
FIELDS: Mapping[Route, Mapping[str, Field]] = {
    "txt2img": {
        **_BOTH,
        "denoising_strength": Field(read=read_number, default=0.75),  # of the second pass
        "enable_hr": Field(read=read_flag, default=False),
        "hr_scale": Field(read=read_number, default=2.0),
        "hr_upscaler": Field(read=read_text, default="Latent"),
        "hr_second_pass_steps": Field(read=read_whole, default=0),
        "hr_resize_x": Field(read=read_whole, default=0),
        "hr_resize_y": Field(read=read_whole, default=0),
        "hr_checkpoint_name": Field(read=read_text),
        "hr_sampler_name": Field(read=read_text),
        "hr_scheduler": Field(read=read_text),
        "hr_prompt": Field(read=read_text, default=""),
        "hr_negative_prompt": Field(read=read_text, default=""),
        "firstphase_width": Field(read=read_whole, default=0, use="listed"),
        "firstphase_height": Field(read=read_whole, default=0, use="listed"),
    },
    "img2img": {
        **_BOTH,
        "denoising_strength": Field(read=read_number, default=0.75),
        "init_images": Field(read=read_list, default=[]),
        "resize_mode": Field(read=read_whole, default=0),
        "mask": Field(read=read_picture),
        "latent_mask": Field(read=read_anything, use="refused"),
        "mask_blur": Field(read=read_number),
        "mask_blur_x": Field(read=read_number, default=4.0),
        "mask_blur_y": Field(read=read_number, default=4.0),
        "mask_round": Field(read=read_flag, default=True, use="listed"),
        "inpainting_fill": Field(read=read_whole, default=0),
        "inpaint_full_res": Field(read=read_flag, default=True),
        "inpaint_full_res_padding": Field(read=read_whole, default=0),
        "inpainting_mask_invert": Field(read=read_flag, default=False),
        "initial_noise_multiplier": Field(read=read_number, use="listed", neutral=(1.0,)),
        "image_cfg_scale": Field(read=read_number, use="listed"),
        "include_init_images": Field(read=read_flag, default=False),
    },
}
SETTINGS: Mapping[str, Field] = {  # those of `override_settings` that a request may have
    "sd_model_checkpoint": Field(read=read_text),
    "CLIP_stop_at_last_layers": Field(read=read_whole, default=1),
    "sd_vae": Field(read=read_text, use="refused", neutral=("", "Automatic", "None")),
    "samples_format": Field(read=read_text, default="png"),
    "randn_source": Field(read=read_text, default="CPU"),
}
# fmt: on


def read_values(
    sent: Mapping[str, Any], fields: Mapping[str, Field], prefix: str = ""
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A value for each field, and the names of what was sent and has no effect.

    Args:
        sent: as JSON has it.
        fields: what there is.
        prefix: of names, for errors.

    Raises:
        FieldError: a value of another kind, or a script.
        UsageError: what is refused.
    """
    values: dict[str, Any] = {}
    left: list[str] = []
    for name, field in fields.items():
        given = sent.get(name)
        values[name] = field.default if given is None else field.read(prefix + name, given)
        if field.use == "used" or field.says_nothing(values[name]):
            continue
        if field.use == "refused":
            raise _refused(prefix + name, values[name])
        left.append(prefix + name)
    left += [f"{prefix}{name}"[:80] for name in sent if name not in fields]
    return values, tuple(left[:_MOST_TOLD])


def _refused(name: str, value: object) -> UsageError:
    kind = FieldError if name == "script_name" else UsageError  # which A1111 answers with 422, too
    return kind(
        f"{name} is {value!r:.80}, which is not carried out here",
        expected=f"no {name}",
        fix=f"Leave {name} out.",
    )
