"""The parameters of a generation, declared once.

An entry of `Parameters` has its type, for type checkers and editors, and a `Parameter` with all the rest:
default, range, which models have a use for it, what it goes together with, a line of help, and its spelling
on the command line. From these come the keyword arguments of `Pipeline` and their checks (`read_parameters`),
the options of `latentrt generate` (cli/generate.py), and what each of two models gets (`refine.py`).

Names are diffusers', except `seed`, `rng`, `sampler` and those that diffusers lacks. This module imports no
NumPy: `latentrt --help` reads it.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from os import PathLike
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypedDict, TypeVar, cast, get_args

from ...engines.errors import UsageError

if TYPE_CHECKING:
    from ...engines.package import Manifest
    from ...engines.spec import Array
    from ..controls.control import Control
    from ..controls.image_prompt import ImagePrompt
    from ..pictures.read import ImageSource
    from ..sampling.table import Table

Texts = str | Sequence[str]  # one for all prompts, or one for each
PromptSyntaxName = Literal["a1111", "comfyui", "plain"]
Rng = Literal["torch-cpu", "torch-cuda"]
ResizeMode = Literal["default", "fill", "crop"]
OutputType = Literal["pil", "np", "float", "latent"]


LONGEST_SIDE = 16384  # of a picture, in pixels
_MOST_GUIDANCE = 1000.0

Bound = int | Callable[["Manifest"], int]  # of every model, or of one


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Values of one kind.

    Attributes:
        check: (parameter name, value, manifest) -> the value in its own type. Raises UsageError.
        text: the type of its text on the command line.
        read: text -> value, where it is more than that type. Raises ValueError.
        metavar: what `--help` calls the text.
        several: whether the option may be given more than once; the value is a list then.
        schema: what JSON Schema says of the values that a model takes.
    """

    check: Callable[[str, Any, "Manifest"], Any] = lambda name, value, manifest: value
    text: type = str
    read: Callable[[str], Any] | None = None
    metavar: str | None = None
    several: bool = False
    schema: Callable[["Manifest"], dict[str, Any]] = lambda manifest: {"type": "string"}


# ── kinds ──────────────────────────────────────────────────────────────────────────────────────────


def check_integer(name: str, value: Any, low: int, high: int) -> int:
    """A whole number from `low` to `high`; neither a bool nor a float."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
        raise UsageError(
            f"{name} is {value!r}", expected=f"an integer from {low} to {high}", fix=f"Change {name}."
        )
    return int(value)


def check_number(name: str, value: Any, low: float, high: float) -> float:
    """A number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= cast(Any, value) <= high:
        raise UsageError(
            f"{name} is {value!r}", expected=f"a number from {low:g} to {high:g}", fix=f"Change {name}."
        )
    return float(value)


def items(value: Any) -> list[Any] | None:
    """The items of a list, a tuple, a range or an array; None for anything else."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    return list(cast(Any, plain)) if isinstance(plain, (list, tuple, range)) else None


def _check_pair(name: str, value: Any, low: int) -> tuple[int, int]:
    found = items(value)
    if found is None or len(found) != 2:
        raise UsageError(f"{name} is {value!r}", expected="two integers", fix=f"Pass {name}=(1024, 1024).")
    first, second = (check_integer(name, item, low, LONGEST_SIDE) for item in found)
    return first, second


def integer(low: int, high: Bound, metavar: str | None = None) -> Kind:
    """Whole numbers from `low` to `high`."""

    def check(name: str, value: Any, manifest: "Manifest") -> int:
        return check_integer(name, value, low, most(manifest))

    def most(manifest: "Manifest") -> int:
        return high(manifest) if callable(high) else high

    return Kind(
        check=check,
        text=int,
        metavar=metavar,
        schema=lambda manifest: {"type": "integer", "minimum": low, "maximum": most(manifest)},
    )


def number(low: float, high: float, metavar: str | None = None) -> Kind:
    """Numbers from `low` to `high`."""
    return Kind(
        check=lambda name, value, _: check_number(name, value, low, high),
        text=float,
        metavar=metavar,
        schema=lambda manifest: {"type": "number", "minimum": low, "maximum": high},
    )


def _takes_unconditional_rows(manifest: "Manifest") -> bool:
    return "timestep_cond" not in manifest.vectors


def _check_guidance(name: str, value: Any, manifest: "Manifest") -> float | tuple[float, ...]:
    """A scale, or a list of one for each step."""
    several = items(value)
    if several is None:
        return check_number(name, value, 0.0, _MOST_GUIDANCE)
    if not several or not _takes_unconditional_rows(manifest):
        raise UsageError(
            f"{name} is {value!r:.100}",
            expected="one number, or with most models one for each step",
            fix=f"Pass {name} as a number.",
        )
    return tuple(check_number(name, one, 0.0, _MOST_GUIDANCE) for one in several)


def _guidance_schema(manifest: "Manifest") -> dict[str, Any]:
    number = {"minimum": 0.0, "maximum": _MOST_GUIDANCE}
    if not _takes_unconditional_rows(manifest):
        return {"type": "number", **number}
    return {"type": ["number", "array"], **number, "items": {"type": "number", **number}, "minItems": 1}


def _floats(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{text!r:.40} is no list of numbers with commas between them") from None


def _read_guidance(text: str) -> float | list[float]:
    found = _floats(text)
    return found[0] if len(found) == 1 else found


def _check_interval(name: str, value: Any, manifest: "Manifest") -> tuple[float, float]:
    found = items(value)
    if found is None or len(found) != 2:
        raise UsageError(f"{name} is {value!r:.80}", expected="two shares", fix=f"Pass {name}=(0.1, 0.8).")
    start, end = (check_number(name, one, 0.0, 1.0) for one in found)
    if start >= end:
        raise UsageError(
            f"{name} begins at {start:g} and ends at {end:g}",
            expected="a part of the run",
            fix=f"Pass {name}=(0.1, 0.8).",
        )
    return start, end


def choice(literal: Any) -> Kind:
    """One of a Literal's names."""
    names = get_args(literal)

    def check(name: str, value: Any, manifest: "Manifest") -> str:
        if value not in names:
            raise UsageError(
                f"{name} is {value!r}", expected=f"one of {', '.join(names)}", fix=f"Change {name}."
            )
        return value

    return Kind(check=check, schema=lambda manifest: {"type": "string", "enum": list(names)})


def _check_pixels(name: str, value: Any, manifest: "Manifest", least: int | None = None) -> int:
    step = manifest.size_multiple
    side = check_integer(name, value, step if least is None else least, LONGEST_SIDE)
    if side % step:
        lower, upper = side // step * step, (side // step + 1) * step
        raise UsageError(
            f"{name} is {side}", expected=f"a multiple of {step}", fix=f"Use {lower} or {upper}."
        )
    return side


def _side(least: int, manifest: "Manifest") -> dict[str, Any]:
    step = manifest.size_multiple
    return {"type": "integer", "minimum": least, "maximum": LONGEST_SIDE, "multipleOf": step}


def _pair(least: int) -> dict[str, Any]:
    side = {"type": "integer", "minimum": least, "maximum": LONGEST_SIDE}
    return {"type": "array", "items": side, "minItems": 2, "maxItems": 2}


def levels(least: int) -> Kind:
    """Descending timesteps or sigmas; what a sampler makes of them is checked where its table is made."""

    def check(name: str, value: Any, manifest: "Manifest") -> tuple[float, ...]:
        found = items(value) or []
        if len(found) < least:
            raise UsageError(
                f"{name} is {value!r}",
                expected=f"a list of {least} numbers or more",
                fix=f"Leave {name} out.",
            )
        return tuple(check_number(name, item, 0.0, 1e6) for item in found)

    return Kind(
        check=check,
        read=_floats,
        metavar="N,N…",
        schema=lambda manifest: {"type": "array", "items": {"type": "number"}, "minItems": least},
    )


def _integers(text: str, separator: str) -> list[int]:
    parts = text.split(separator)
    if not all(part.strip().lstrip("-").isdigit() for part in parts):
        raise ValueError(text)
    return [int(part) for part in parts]


def _read_size(text: str) -> tuple[int, int]:
    width, height = _integers(text, "x")
    return height, width


def _read_offset(text: str) -> tuple[int, int]:
    left, top = _integers(text, ",")
    return top, left


def _read_seeds(text: str) -> int | list[int]:
    found = _integers(text, ",")
    return found[0] if len(found) == 1 else found


def _read_latents(text: str) -> "Array":
    from ..pictures.read import read_latents

    return read_latents(text)


def check_loras(value: Any, name: str = "loras") -> tuple[tuple[str, Any], ...]:
    """Names of adapters, alone or in pairs with strengths. Raises UsageError for anything else."""
    from ...adapters.sets import Strength

    found = items(value)
    if found is None:
        raise UsageError(
            f"{name} is {value!r:.100}",
            expected="a list of names, or of (name, strength)",
            fix=f'Pass {name}=[("NAME", 0.8)].',
        )
    pairs: list[tuple[str, Any]] = []
    for one in found:
        pair: list[Any] = [one, 1.0] if isinstance(one, str) else items(one) or []
        if len(pair) != 2 or not isinstance(pair[0], str):
            raise UsageError(
                f"{name} has {one!r:.100}",
                expected="a name, or (name, strength)",
                fix=f'Pass {name}=[("NAME", 0.8)].',
            )
        Strength.parse(pair[1])
        pairs.append((pair[0], pair[1]))
    return tuple(pairs)


def _check_controls(name: str, value: Any, manifest: "Manifest") -> tuple["Control | ImagePrompt", ...]:
    from ..controls.control import Control
    from ..controls.image_prompt import ImagePrompt

    kinds = (Control, ImagePrompt)
    found = [value] if isinstance(value, kinds) else items(value)
    if found is None or not all(isinstance(one, kinds) for one in found):
        raise UsageError(
            f"{name} is {value!r:.100}",
            expected="a list of Control and ImagePrompt",
            fix=f'Pass {name}=[latentrt.Control(model="canny", image="edges.png")].',
        )
    return tuple(map(_check_control, cast("list[Control | ImagePrompt]", found)))


def _check_control(control: "Control | ImagePrompt") -> "Control | ImagePrompt":
    """The same with plain numbers: whole ones and NumPy's would be other types further on."""
    from ..controls.image_prompt import ImagePrompt

    model: object = control.model
    if not isinstance(model, str) or not model:
        raise UsageError(
            f"the model of a control is {model!r:.80}",
            expected="the name of one that was loaded",
            fix="Load it first: pipe.load_control(FILE) returns its name.",
        )
    what = "ip_adapter" if isinstance(control, ImagePrompt) else "control"
    share: dict[str, Any] = {
        "start": check_number(f"{what}_start", control.start, 0.0, 1.0),
        "end": check_number(f"{what}_end", control.end, 0.0, 1.0),
    }
    if control.start >= control.end:
        raise UsageError(
            f"{what}_start {control.start:g} is not before {what}_end {control.end:g}",
            expected="a part of the steps",
            fix="Exchange the two." if control.start > control.end else f"Change {what}_end.",
        )
    kind = _check_prompt if isinstance(control, ImagePrompt) else _check_net
    return replace(control, **share, strength=kind(cast(Any, control)))


def _check_prompt(prompt: "ImagePrompt") -> Any:
    """Its strength."""
    from ..controls.image_prompt import numbers_of

    for one in numbers_of(prompt.strength):
        check_number("ip_adapter_strength", one, -100.0, 100.0)
    if isinstance(prompt.strength, (list, tuple)):
        raise UsageError(
            f"ip_adapter_strength is {prompt.strength!r:.80}",
            expected="a number, or a mapping of down, mid and up",
            fix="Change ip_adapter_strength.",
        )
    return prompt.strength if isinstance(prompt.strength, Mapping) else float(prompt.strength)


def _check_net(control: "Control") -> float:
    """Its strength."""
    from ..controls.control import Mode

    for name, odd in (("preparation", control.preparation), ("resize_mode", control.resize_mode)):
        if odd is not None and not isinstance(cast(object, odd), str):
            raise UsageError(
                f"control_{name} is {odd!r:.80}", expected="a name", fix=f"Change control_{name}."
            )
    if not isinstance(cast(object, control.settings), Mapping):
        raise UsageError(
            f"the settings of a control are {control.settings!r:.80}",
            expected="a mapping of names to values",
            fix="Leave settings out.",
        )
    if control.mode not in get_args(Mode):
        raise UsageError(
            f"control_mode is {control.mode!r:.80}",
            expected=f"one of {', '.join(get_args(Mode))}",
            fix="Change control_mode.",
        )
    return check_number("control_strength", control.strength, -100.0, 100.0)


def _read_lora(text: str) -> str | tuple[str, Any]:
    """NAME, NAME:STRENGTH or NAME:STRENGTH:TEXT ENCODERS, where the name may have colons too."""
    name, *_ = parts = text.rsplit(":", 2)
    numbers: list[float] = []
    while len(parts) > 1 and len(numbers) < 2 and _is_number(parts[-1]):
        numbers.insert(0, float(parts.pop()))
    name = ":".join(parts)
    if not numbers:
        return name
    if len(numbers) == 1:
        return name, numbers[0]
    return name, {"unet": numbers[0], "text_encoder": numbers[1], "text_encoder_2": numbers[1]}


def lora_text(name: str, strength: Any) -> str:
    """What `LORAS` reads of an adapter and its strength; the name alone where blocks have their own."""
    if not isinstance(strength, Mapping):
        return f"{name}:{strength}"
    parts = cast("Mapping[str, Any]", strength)
    unet, *others = (parts.get(part, 1.0) for part in ("unet", "text_encoder", "text_encoder_2"))
    if isinstance(unet, Mapping) or isinstance(others[0], Mapping) or others[0] != others[1]:
        return name
    return f"{name}:{unet}:{others[0]}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# A side of a picture or a tile: a multiple of what the model's latents need.
PIXELS = Kind(
    check=_check_pixels,
    text=int,
    metavar="PIXELS",
    schema=lambda manifest: _side(manifest.size_multiple, manifest),
)
# Of two tiles, what they share.
SHARED = Kind(
    check=lambda name, value, manifest: _check_pixels(name, value, manifest, 0),
    text=int,
    metavar="PIXELS",
    schema=lambda manifest: _side(0, manifest),
)
# (height, width) and (top, left) in pixels.
SIZE = Kind(
    check=lambda name, value, _: _check_pair(name, value, 1),
    read=_read_size,
    metavar="WIDTHxHEIGHT",
    schema=lambda manifest: _pair(1),
)
OFFSET = Kind(
    check=lambda name, value, _: _check_pair(name, value, 0),
    read=_read_offset,
    metavar="LEFT,TOP",
    schema=lambda manifest: _pair(0),
)
GUIDANCE = Kind(check=_check_guidance, read=_read_guidance, metavar="N[,N…]", schema=_guidance_schema)
# (start, end) as shares of the run.
INTERVAL = Kind(
    check=_check_interval,
    read=_floats,
    metavar="START,END",
    schema=lambda manifest: {
        "type": "array",
        "items": {"type": "number", "minimum": 0.0, "maximum": 1.0},
        "minItems": 2,
        "maxItems": 2,
    },
)
# These three are checked where the pictures are counted (request.py, source.py).
LORAS = Kind(
    check=lambda name, value, _: check_loras(value, name),
    read=_read_lora,
    metavar="NAME[:STRENGTH[:TEXT ENCODERS]]",
    several=True,
)
CONTROLS = Kind(check=_check_controls)
SEEDS = Kind(read=_read_seeds, metavar="N[,N…]")
LATENTS = Kind(read=_read_latents, metavar="FILE.npy")
IMAGE = Kind(read=lambda text: _read_latents(text) if text.endswith(".npy") else text, metavar="FILE")


# ── declarations ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Need:
    """What a model must have for a parameter to be of use, in words, and whether a package has it."""

    words: str
    fits: Callable[["Manifest"], bool]


def _two_encoders(manifest: "Manifest") -> bool:
    from ...engines.spec import TEXT_ENCODERS

    return set(TEXT_ENCODERS) <= set(manifest.nets)


TWO_ENCODERS = Need("two text encoders", _two_encoders)
GUIDED = Need("unconditional rows (of an LCM the scale is an input)", _takes_unconditional_rows)
VARIES = Need("a picture to vary (unCLIP)", lambda manifest: "class_labels" in manifest.vectors)
STARTS = Need(
    "a picture to start from (this one varies its picture)", lambda manifest: not VARIES.fits(manifest)
)
SIZES = Need("size conditions (SDXL)", lambda manifest: "original_height" in manifest.time_ids)
TARGETS = Need(
    "target sizes as a condition (SDXL base)", lambda manifest: "target_height" in manifest.time_ids
)
SCORES = Need("aesthetic scores (the SDXL refiner)", lambda manifest: "aesthetic_score" in manifest.time_ids)


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """All that is said of a parameter besides its name and type.

    Attributes:
        help: a line for people.
        kind: its values, and their texts on the command line.
        default: None is for the model, or the picture, to say.
        flags: its options of `latentrt generate`; () for one made of the name, None for no option.
        model: what a model must have for it.
        needs: parameters without which it has no use.
        with_it: what must come along, in words, where that is another thing than usual.
        excludes: parameters that it cannot go with.
        stage: which of two models gets it when one draws on where the other stopped.
    """

    help: str
    kind: Kind = Kind()
    default: Any = None
    flags: tuple[str, ...] | None = ()
    model: Need | None = None
    needs: tuple[str, ...] = ()
    with_it: str = ""
    excludes: tuple[str, ...] = ()
    stage: Literal["both", "base", "refiner"] = "both"

    def is_default(self, value: object) -> bool:
        """Whether the value says nothing: the default, or a list or an array equal to it."""
        if value is None or self.default is None:
            return value is None
        several = items(self.default)
        if several is not None:
            return items(value) == several
        return not isinstance(value, bool) and value == self.default


def _last_noise_level(manifest: "Manifest") -> int:
    """The last timestep of the noise on pictures to vary."""
    steps = (manifest.image_noise or {}).get("num_train_timesteps", 1000)
    return steps - 1 if isinstance(steps, int) else 999


# fmt: off
class Parameters(TypedDict, total=False):
    """The keyword arguments of a generation. What is left out has the default of its `Parameter`."""

    negative_prompt: Annotated[Texts | None, Parameter(
        help="What to avoid.", flags=("--negative-prompt", "-n"))]
    prompt_2: Annotated[Texts | None, Parameter(
        help="For the second text encoder. Default: the prompt.", model=TWO_ENCODERS, stage="base")]
    negative_prompt_2: Annotated[Texts | None, Parameter(
        help="Likewise.", model=TWO_ENCODERS, stage="base")]
    prompt_syntax: Annotated[PromptSyntaxName, Parameter(
        help="How prompts are weighted: a1111 (the default), comfyui, plain.",
        kind=choice(PromptSyntaxName), default="a1111")]
    clip_skip: Annotated[int | None, Parameter(
        help="Leave out so many of the text encoder's last layers.",
        kind=integer(0, lambda manifest: manifest.max_clip_skip))]
    loras: Annotated["Sequence[str | tuple[str, Any]] | None", Parameter(
        help="An adapter to draw with: a name or a file, and how strongly. May be given again.",
        kind=LORAS, flags=("--lora",))]
    controls: Annotated["Sequence[Control | ImagePrompt] | None", Parameter(
        help="Pictures that steer.", kind=CONTROLS, flags=None, stage="base")]
    height: Annotated[int | None, Parameter(
        help="Pixels. Default: the picture's or the model's.", kind=PIXELS, flags=("--height", "-H"))]
    width: Annotated[int | None, Parameter(
        help="Pixels. Default: the picture's or the model's.", kind=PIXELS, flags=("--width", "-W"))]
    num_inference_steps: Annotated[int | None, Parameter(
        help="Number of inference steps. Default: the model's.",
        kind=integer(1, 1000), flags=("--steps",), excludes=("timesteps", "sigmas"))]
    timesteps: Annotated[Sequence[float] | None, Parameter(
        help="Descending timesteps, in place of the sampler's own.",
        kind=levels(1), excludes=("sigmas",))]
    sigmas: Annotated[Sequence[float] | None, Parameter(
        help="Descending sigmas with a final 0, in place of Euler's own.", kind=levels(2))]
    table: Annotated["str | PathLike[str] | Table | None", Parameter(
        help="A table, as `latentrt inspect --sampler NAME --json` prints it, in place of a sampler.",
        kind=Kind(metavar="FILE"),
        excludes=("num_inference_steps", "timesteps", "sigmas", "sampler", "eta", "strength",
                  "denoising_start", "denoising_end"))]
    guidance_scale: Annotated[float | Sequence[float] | None, Parameter(
        help="1 or less is off; a list has one for each step. Default: the model's.",
        kind=GUIDANCE, flags=("--guidance-scale", "--cfg-scale"))]
    guidance_interval: Annotated[Sequence[float] | None, Parameter(
        help="Guide between these shares of the steps alone, which is faster. Default: all of them.",
        kind=INTERVAL, model=GUIDED)]
    guidance_rescale: Annotated[float, Parameter(
        help="0 (off) to 1, against overexposure (Lin et al. 2023).",
        kind=number(0.0, 1.0), default=0.0)]
    sampler: Annotated[str | Mapping[str, Any] | None, Parameter(
        help="`latentrt inspect --samplers` lists them. Default: the model's.")]
    eta: Annotated[float, Parameter(
        help="DDIM's noise: 0 is deterministic, 1 is DDPM.", kind=number(0.0, 1.0), default=0.0)]
    seed: Annotated[int | Sequence[int] | None, Parameter(
        help="One, or one a picture. Default: random, as is -1.", kind=SEEDS, flags=("--seed", "-s"))]
    rng: Annotated[Rng, Parameter(
        help="Whose noise the seed means: torch-cpu (default), torch-cuda.",
        kind=choice(Rng), default="torch-cpu")]
    num_images_per_prompt: Annotated[int, Parameter(
        help="Pictures to draw of every prompt, with seeds counting up. Default: 1.",
        kind=integer(1, 1024), default=1, flags=("--count", "-b"))]
    latents: Annotated["Array | None", Parameter(
        help="Unit noise (N, C, H/8, W/8), in place of the seed's.",
        kind=LATENTS, excludes=("denoising_start",), stage="base")]
    image: Annotated["ImageSource | Sequence[ImageSource] | None", Parameter(
        help="Picture to start from, or to vary.", kind=IMAGE, flags=("--image", "-i"), stage="base")]
    mask_image: Annotated["ImageSource | None", Parameter(
        help="White is repainted, the rest stays as it is.", kind=Kind(metavar="FILE"),
        flags=("--mask",), model=STARTS, needs=("image",), excludes=("denoising_start",))]
    strength: Annotated[float | None, Parameter(
        help="0 to 1: how much of the schedule runs on the picture.", kind=number(0.0, 1.0),
        model=STARTS, needs=("image",), excludes=("denoising_start",), stage="base")]
    padding_mask_crop: Annotated[int | None, Parameter(
        help="Draw only the mask and so much around it, at full size.",
        kind=integer(0, LONGEST_SIDE, "PIXELS"), model=STARTS, needs=("image", "mask_image"))]
    mask_blur: Annotated[float, Parameter(
        help="Soften the edge of what is repainted.",
        kind=number(0.0, 1000.0, "PIXELS"), default=0.0, model=STARTS, needs=("mask_image",))]
    resize_mode: Annotated[ResizeMode, Parameter(
        help="Of the picture: default (stretch), fill, crop.", kind=choice(ResizeMode), default="default",
        model=STARTS, excludes=("mask_image",), stage="base")]
    upscale: Annotated[float | None, Parameter(
        help="Enlarge the picture so many times, and redraw it in tiles (--draw-tile; --strength: 0.35).",
        kind=number(1.0, 16.0), model=STARTS, needs=("image",), stage="base",
        excludes=("height", "width", "mask_image", "denoising_start"))]
    draw_tile: Annotated[int | None, Parameter(
        help="Draw in overlapping tiles of this side. Default: none; with --upscale, the model's.",
        kind=PIXELS)]
    draw_overlap: Annotated[int | None, Parameter(
        help="What tiles share, up to half of one. Default: a quarter.", kind=SHARED)]
    noise_level: Annotated[int, Parameter(
        help="0 to 999: how far a variation departs from its picture.",
        kind=integer(0, _last_noise_level), default=0, model=VARIES)]
    denoising_start: Annotated[float | None, Parameter(
        help="Go on from a latent (--image FILE.npy) at this share of the schedule.",
        kind=number(0.0, 1.0), model=STARTS, needs=("image",),
        with_it="as image, the latent that another model drew with denoising_end and output_type='latent'")]
    denoising_end: Annotated[float | None, Parameter(
        help="Stop at this share of the schedule; with -o FILE.npy, for another model.",
        kind=number(0.0, 1.0))]
    original_size: Annotated[Sequence[int] | None, Parameter(
        help="SDXL: the size that the picture once had.", kind=SIZE, model=SIZES)]
    crops_coords_top_left: Annotated[Sequence[int], Parameter(
        help="SDXL: where it was cut off.",
        kind=OFFSET, default=(0, 0), flags=("--crop",), model=SIZES)]
    target_size: Annotated[Sequence[int] | None, Parameter(
        help="SDXL: the size that it is to have.", kind=SIZE, model=TARGETS, stage="base")]
    negative_original_size: Annotated[Sequence[int] | None, Parameter(
        help="SDXL: the same, to avoid.", kind=SIZE, model=SIZES)]
    negative_crops_coords_top_left: Annotated[Sequence[int] | None, Parameter(
        help="SDXL: the same, to avoid.", kind=OFFSET, flags=("--negative-crop",), model=SIZES)]
    negative_target_size: Annotated[Sequence[int] | None, Parameter(
        help="SDXL: the same, to avoid.", kind=SIZE, model=TARGETS, stage="base")]
    aesthetic_score: Annotated[float, Parameter(
        help="SDXL refiner: how beautiful. Default: 6.",  # those of LAION's predictor lie between 0 and 10
        kind=number(0.0, 1000.0), default=6.0, model=SCORES, stage="refiner")]
    negative_aesthetic_score: Annotated[float, Parameter(
        help="SDXL refiner: to avoid. Default: 2.5.",
        kind=number(0.0, 1000.0), default=2.5, model=SCORES, stage="refiner")]
    tile: Annotated[int | None, Parameter(
        help="Encode and decode in tiles of this side, for less memory.", kind=PIXELS)]


class CallParameters(Parameters, total=False):
    """The same with what the type of a result depends on."""

    output_type: Annotated[OutputType, Parameter(
        help="PIL images; one array, uint8 (np) or 0 to 1 (float: diffusers' np); or the latents.",
        kind=choice(OutputType), default="pil", flags=None, stage="refiner")]

# fmt: on


PARAMETERS: Mapping[str, Parameter] = {
    name: annotation.__metadata__[0] for name, annotation in CallParameters.__annotations__.items()
}

Method = TypeVar("Method", bound=Callable[..., object])


def spelled_out(method: Method) -> Method:
    """Show the declared parameters in the signature of a method that takes `**parameters`, for `help()`."""
    signature = inspect.signature(method)
    own = [item for item in signature.parameters.values() if item.kind is not item.VAR_KEYWORD]
    declared = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=item.default,
            annotation=CallParameters.__annotations__[name].__origin__,
        )
        for name, item in PARAMETERS.items()
        if name not in signature.parameters and name in Parameters.__annotations__
    ]
    setattr(method, "__signature__", signature.replace(parameters=[*own, *declared]))  # noqa: B010
    return method


# What other programs call them.
_ELSEWHERE = {
    "steps": "num_inference_steps",
    "num_steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "generator": "seed",
    "scheduler": "sampler",
    "num_images": "num_images_per_prompt",
    "batch_size": "num_images_per_prompt",
    "mask": "mask_image",
    "init_image": "image",
    "upscale_factor": "upscale",
    "tile_upscale": "upscale",
    "upscale_by": "upscale",
    "tile_width": "draw_tile",
    "tile_size": "draw_tile",
    "window_size": "draw_tile",
    "tile_overlap": "draw_overlap",
}
_NOUNS = {"image": "an image", "mask_image": "a mask"}
_WANTED = {
    "image": "a picture to start from",
    "mask_image": "mask_image, white where the picture is to be repainted",
}


def read_parameters(manifest: "Manifest", parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Check each parameter by itself and against the others; fill in the defaults.

    Args:
        manifest: of the model that is to draw.
        parameters: as they were passed.

    Returns:
        A value for every name of `PARAMETERS`. `image`, `latents`, `seed` and texts are as they were passed:
        what they must fit is known later.

    Raises:
        UsageError: naming the parameter, what it was, and what it may be.
    """
    for name in parameters:
        if name not in PARAMETERS:
            _refuse_unknown(name)
    chosen = {name for name, value in parameters.items() if not PARAMETERS[name].is_default(value)}
    for name in PARAMETERS:
        if name in chosen:
            _refuse_unfitting(manifest, name, parameters[name], chosen)
    return {
        name: _checked(name, parameter, parameters.get(name, parameter.default), manifest)
        for name, parameter in PARAMETERS.items()
    }


def nearest(name: str, known: Iterable[str] = PARAMETERS) -> str | None:
    """What a name may mean: a known one that other programs call so, or one that is spelled alike."""
    from difflib import get_close_matches

    names, elsewhere = list(known), _ELSEWHERE.get(name)
    return elsewhere if elsewhere in names else next(iter(get_close_matches(name, names, 1)), None)


def _refuse_unknown(name: str) -> NoReturn:
    near = nearest(name)
    raise UsageError(
        f"there is no parameter {name!r}",
        expected=f"{near!r}" if near else f"one of {', '.join(PARAMETERS)}",
        fix=f"Write {near}=…" if near else f"Leave {name} out.",
    )


def _checked(name: str, parameter: Parameter, value: Any, manifest: "Manifest") -> Any:
    if value is None and parameter.default is None:
        return None
    return parameter.kind.check(name, value, manifest)


def _refuse_unfitting(manifest: "Manifest", name: str, value: Any, chosen: set[str]) -> None:
    """A parameter that could only be ignored is an error."""
    parameter = PARAMETERS[name]
    if parameter.model is not None and not parameter.model.fits(manifest):
        shown = f"{name} is {value!r}" if isinstance(value, (str, int, float, tuple)) else name
        raise UsageError(
            f"{shown}, and the model {manifest.name!r} has no use for it",
            expected=f"a model with {parameter.model.words}",
            fix=f"Leave {name} out.",
        )
    for other in parameter.needs:
        if other not in chosen:
            raise UsageError(
                f"{name} without {_NOUNS.get(other, other)}",
                expected=parameter.with_it or _WANTED.get(other, other),
                fix=f"Pass {other}=… ({_flag(other)}), or leave {name} out.",
            )
    for other in parameter.excludes:
        if other in chosen:
            raise UsageError(
                f"{name} with {_NOUNS.get(other, other)}",
                expected="one of them",
                fix=f"Leave one of {name} and {other} out.",
            )


def _flag(name: str) -> str:
    return (PARAMETERS[name].flags or (f"--{name.replace('_', '-')}",))[0]
