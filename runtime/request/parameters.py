"""The parameters of a generation, declared once.

An entry of `Parameters` has its type, for type checkers and editors, and a `Parameter` with all the rest:
default, range, which models have a use for it, what it goes together with, a line of help, and its spelling
on the command line. From these come the keyword arguments of `Pipeline` and their checks (`read_parameters`),
the options of `latentrt generate` (cli/generate_options.py), and what each of two models gets (`refine.py`).

Names are diffusers', except `seed`, `rng`, `sampler` and those that diffusers lacks. This module imports no
NumPy: `latentrt --help` reads it.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypedDict, TypeVar, get_args

from ...engines.errors import UsageError
from . import kinds

if TYPE_CHECKING:
    from ...engines.package import Manifest
    from ...engines.spec import Array
    from ..pictures.read import ImageSource

Texts = str | Sequence[str]  # one for all prompts, or one for each
PromptSyntaxName = Literal["a1111", "comfyui", "plain"]
Rng = Literal["torch-cpu", "torch-cuda"]
ResizeMode = Literal["default", "fill", "crop"]
OutputType = Literal["pil", "np", "latent"]


@dataclass(frozen=True)
class Need:
    """What a model must have for a parameter to be of use, in words, and whether a package has it."""

    words: str
    fits: Callable[["Manifest"], bool]


def _two_encoders(manifest: "Manifest") -> bool:
    from ...engines.spec import TEXT_ENCODERS

    return set(TEXT_ENCODERS) <= set(manifest.nets)


TWO_ENCODERS = Need("two text encoders", _two_encoders)
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
        excludes: parameters that it cannot go with.
        stage: which of two models gets it when one draws on where the other stopped.
    """

    help: str
    kind: kinds.Kind = kinds.ANY
    default: Any = None
    flags: tuple[str, ...] | None = ()
    model: Need | None = None
    needs: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    stage: Literal["both", "base", "refiner"] = "both"

    def is_default(self, value: object) -> bool:
        """Whether the value says nothing: the default, or a list or an array equal to it."""
        if value is None or self.default is None:
            return value is None
        several = kinds.items(self.default)
        if several is not None:
            return kinds.items(value) == several
        return not isinstance(value, bool) and value == self.default


def _names(literal: Any) -> kinds.Kind:
    return kinds.choice(get_args(literal))


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
        kind=_names(PromptSyntaxName), default="a1111")]
    clip_skip: Annotated[int | None, Parameter(
        help="Leave out so many of the text encoder's last layers.",
        kind=kinds.integer(0, lambda manifest: manifest.max_clip_skip))]
    height: Annotated[int | None, Parameter(
        help="Pixels. Default: the picture's or the model's.", kind=kinds.pixels(), flags=("--height", "-H"))]
    width: Annotated[int | None, Parameter(
        help="Pixels. Default: the picture's or the model's.", kind=kinds.pixels(), flags=("--width", "-W"))]
    num_inference_steps: Annotated[int | None, Parameter(
        help="Number of inference steps. Default: the model's.",
        kind=kinds.integer(1, 1000), flags=("--steps",), excludes=("timesteps", "sigmas"))]
    timesteps: Annotated[Sequence[float] | None, Parameter(
        help="Descending timesteps, in place of the sampler's own.",
        kind=kinds.levels(), excludes=("sigmas",))]
    sigmas: Annotated[Sequence[float] | None, Parameter(
        help="Descending sigmas with a final 0, in place of Euler's own.", kind=kinds.levels())]
    guidance_scale: Annotated[float | None, Parameter(
        help="1 or less is off. Default: the model's.",
        kind=kinds.number(0.0, 1000.0), flags=("--guidance-scale", "--cfg-scale"))]
    guidance_rescale: Annotated[float, Parameter(
        help="0 (off) to 1, against overexposure (Lin et al. 2023).",
        kind=kinds.number(0.0, 1.0), default=0.0)]
    sampler: Annotated[str | Mapping[str, Any] | None, Parameter(
        help="`latentrt inspect --samplers` lists them. Default: the model's.")]
    eta: Annotated[float, Parameter(
        help="DDIM's noise: 0 is deterministic, 1 is DDPM.", kind=kinds.number(0.0, 1.0), default=0.0)]
    seed: Annotated[int | Sequence[int] | None, Parameter(
        help="One, or one a picture. Default: random.", kind=kinds.seeds(), flags=("--seed", "-s"))]
    rng: Annotated[Rng, Parameter(
        help="Whose noise the seed means: torch-cpu (default), torch-cuda.",
        kind=_names(Rng), default="torch-cpu")]
    num_images_per_prompt: Annotated[int, Parameter(
        help="Pictures to draw of every prompt, with seeds counting up.",
        kind=kinds.integer(1, 1024), default=1, flags=("--count", "-b"))]
    latents: Annotated["Array | None", Parameter(
        help="Unit noise (N, C, H/8, W/8), in place of the seed's.",
        kind=kinds.latents(), excludes=("denoising_start",), stage="base")]
    image: Annotated["ImageSource | Sequence[ImageSource] | None", Parameter(
        help="Picture to start from, or to vary.", kind=kinds.image(), flags=("--image", "-i"), stage="base")]
    mask_image: Annotated["ImageSource | None", Parameter(
        help="White is repainted, the rest stays as it is.", kind=kinds.Kind(metavar="FILE"),
        flags=("--mask",), model=STARTS, needs=("image",), excludes=("denoising_start",))]
    strength: Annotated[float | None, Parameter(
        help="0 to 1: how much of the schedule runs on the picture.", kind=kinds.number(0.0, 1.0),
        model=STARTS, needs=("image",), excludes=("denoising_start",), stage="base")]
    padding_mask_crop: Annotated[int | None, Parameter(
        help="Draw only the mask and so much around it, at full size.",
        kind=kinds.integer(0, 16384, "PIXELS"), model=STARTS, needs=("image", "mask_image"))]
    mask_blur: Annotated[float, Parameter(
        help="Soften the edge of what is repainted.",
        kind=kinds.number(0.0, 1000.0, "PIXELS"), default=0.0, model=STARTS, needs=("mask_image",))]
    resize_mode: Annotated[ResizeMode, Parameter(
        help="Of the picture: default (stretch), fill, crop.", kind=_names(ResizeMode), default="default",
        model=STARTS, excludes=("mask_image",), stage="base")]
    noise_level: Annotated[int, Parameter(
        help="0 to 999: how far a variation departs from its picture.",
        kind=kinds.integer(0, _last_noise_level), default=0, model=VARIES)]
    denoising_start: Annotated[float | None, Parameter(
        help="Go on from a latent (--image FILE.npy) at this share of the schedule.",
        kind=kinds.number(0.0, 1.0), model=STARTS, needs=("image",))]
    denoising_end: Annotated[float | None, Parameter(
        help="Stop at this share of the schedule; with -o FILE.npy, for another model.",
        kind=kinds.number(0.0, 1.0))]
    original_size: Annotated[Sequence[int] | None, Parameter(
        help="SDXL: (height, width) that the picture once had.", kind=kinds.size(), model=SIZES)]
    crops_coords_top_left: Annotated[Sequence[int], Parameter(
        help="SDXL: where it was cut off.",
        kind=kinds.offset(), default=(0, 0), flags=("--crop",), model=SIZES)]
    target_size: Annotated[Sequence[int] | None, Parameter(
        help="SDXL: (height, width) that it is to have.", kind=kinds.size(), model=TARGETS, stage="base")]
    negative_original_size: Annotated[Sequence[int] | None, Parameter(
        help="SDXL: the same, to avoid.", kind=kinds.size(), model=SIZES)]
    negative_crops_coords_top_left: Annotated[Sequence[int] | None, Parameter(
        help="SDXL: the same, to avoid.", kind=kinds.offset(), flags=("--negative-crop",), model=SIZES)]
    negative_target_size: Annotated[Sequence[int] | None, Parameter(
        help="SDXL: the same, to avoid.", kind=kinds.size(), model=TARGETS, stage="base")]
    aesthetic_score: Annotated[float, Parameter(
        help="SDXL refiner: how beautiful. Default: 6.",  # those of LAION's predictor lie between 0 and 10
        kind=kinds.number(0.0, 1000.0), default=6.0, model=SCORES, stage="refiner")]
    negative_aesthetic_score: Annotated[float, Parameter(
        help="SDXL refiner: to avoid. Default: 2.5.",
        kind=kinds.number(0.0, 1000.0), default=2.5, model=SCORES, stage="refiner")]
    tile: Annotated[int | None, Parameter(
        help="Encode and decode in tiles of this side, for less memory.", kind=kinds.pixels())]
    output_type: Annotated[OutputType, Parameter(
        help="PIL images, one uint8 array, or the latents.",
        kind=_names(OutputType), default="pil", flags=None, stage="refiner")]

# fmt: on


PARAMETERS: Mapping[str, Parameter] = {
    name: annotation.__metadata__[0] for name, annotation in Parameters.__annotations__.items()
}

Method = TypeVar("Method", bound=Callable[..., object])


def spelled_out(method: Method) -> Method:
    """Show the declared parameters in the signature of a method that takes `**parameters`, for `help()`."""
    signature = inspect.signature(method)
    own = [item for item in signature.parameters.values() if item.kind is not item.VAR_KEYWORD]
    declared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=item.default)
        for name, item in PARAMETERS.items()
    ]
    setattr(method, "__signature__", signature.replace(parameters=[*own, *declared]))  # noqa: B010
    return method


# What other programs call them.
_ELSEWHERE = {
    "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "generator": "seed",
    "scheduler": "sampler",
    "num_images": "num_images_per_prompt",
    "batch_size": "num_images_per_prompt",
    "mask": "mask_image",
    "init_image": "image",
}
_NOUNS = {"image": "an image", "mask_image": "a mask"}


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


def _refuse_unknown(name: str) -> NoReturn:
    from difflib import get_close_matches

    near = _ELSEWHERE.get(name) or next(iter(get_close_matches(name, PARAMETERS, 1)), None)
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
                expected=f"{other}: {PARAMETERS[other].help}",
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
