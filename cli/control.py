"""The options of pictures that steer or are drawn after, and how much each of them counts."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ..engines.errors import UsageError

if TYPE_CHECKING:
    from ..runtime.controls.control import Control
    from ..runtime.controls.image_prompt import ImagePrompt
    from ..runtime.pipeline import Pipeline

# An option -> the field of what it is for, and how it is given.
Options = Mapping[str, tuple[str, Any]]
_CONTROL_OPTIONS: Options = {
    "control_net": (
        "model",
        Annotated[
            list[str] | None,
            Option(
                "--control-net",
                "--t2i-adapter",
                help="A ControlNet or a T2I-Adapter: its file, folder or ORG/NAME.",
            ),
        ],
    ),
    "control_image": (
        "image",
        Annotated[list[str] | None, Option(help="The picture that it reads: a ready map.", metavar="FILE")],
    ),
    "control_strength": (
        "strength",
        Annotated[list[float] | None, Option(help="How much it counts. Default: 1.")],
    ),
    "control_start": (
        "start",
        Annotated[list[float] | None, Option(help="From which share of the steps on. Default: 0.")],
    ),
    "control_end": (
        "end",
        Annotated[list[float] | None, Option(help="Up to which share of the steps. Default: 1.")],
    ),
    "control_mode": (
        "mode",
        Annotated[list[str] | None, Option(help="balanced (the default), prompt, control, guess.")],
    ),
    "control_preparation": (
        "preparation",
        Annotated[
            list[str] | None,
            Option(help="What makes a map of the picture: canny, invert, threshold, blur, tile, shuffle, …."),
        ],
    ),
    "control_type": (
        "control_type",
        Annotated[
            list[str] | None,
            Option(help="What it is, for a Union: openpose, depth, canny, …, if not what is prepared."),
        ],
    ),
    "control_resize": (
        "resize_mode",
        Annotated[list[str] | None, Option(help="stretch (the default), crop, pad.")],
    ),
    "control_mask": (
        "mask_image",
        Annotated[list[str] | None, Option(help="White where inpaint draws anew.", metavar="FILE")],
    ),
}
_PROMPT_OPTIONS: Options = {
    "ip_adapter": (
        "model",
        Annotated[list[str] | None, Option(help="An IP-Adapter: its file, folder or ORG/NAME.")],
    ),
    "ip_adapter_image": (
        "image",
        Annotated[list[str] | None, Option(help="A picture to draw after; several for one.", metavar="FILE")],
    ),
    "ip_adapter_strength": (
        "strength",
        Annotated[list[float] | None, Option(help="How much it counts. Default: 1.")],
    ),
    "ip_adapter_start": (
        "start",
        Annotated[list[float] | None, Option(help="From which share of the steps on. Default: 0.")],
    ),
    "ip_adapter_end": (
        "end",
        Annotated[list[float] | None, Option(help="Up to which share of the steps. Default: 1.")],
    ),
    "ip_adapter_mask": (
        "mask_image",
        Annotated[list[str] | None, Option(help="White where its picture counts.", metavar="FILE")],
    ),
    "image_encoder": (
        "encoder",
        Annotated[
            list[str] | None,
            Option(help="What it sees pictures through. Default: the folder image_encoder beside it."),
        ],
    ),
}
_CANNY = Annotated[bool, Option("--canny", help="The same as --control-preparation canny.")]

Given = Mapping[str, Sequence[Any] | None]
OpenControls = Callable[["Pipeline"], "list[Control | ImagePrompt]"]


def with_control_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `controls` (an `OpenControls`) the options above."""

    @wraps(command)
    def with_options(**given: Any) -> None:
        controls, prompts = (
            {field: given.pop(name) for name, (field, _) in options.items()}
            for options in (_CONTROL_OPTIONS, _PROMPT_OPTIONS)
        )
        if given.pop("canny"):
            controls["preparation"] = ["canny"]
        command(**given, controls=partial(_opened, controls=controls, prompts=prompts))

    signature = inspect.signature(command, eval_str=True)
    own = [item for name, item in signature.parameters.items() if name != "controls"]
    kind = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter(name, kind, default=None, annotation=how)
        for name, (_, how) in {**_CONTROL_OPTIONS, **_PROMPT_OPTIONS}.items()
    ]
    canny = inspect.Parameter("canny", kind, default=False, annotation=_CANNY)
    setattr(with_options, "__signature__", signature.replace(parameters=[*own, *options, canny]))  # noqa: B010
    return with_options


def _opened(pipe: Pipeline, controls: Given, prompts: Given) -> list[Control | ImagePrompt]:
    """The controls of a command; their nets are loaded."""
    from ..runtime.controls.control import Control
    from ..runtime.controls.image_prompt import ImagePrompt

    asked: list[tuple[type[Control | ImagePrompt], dict[str, Any]]] = [
        *((Control, one) for one in _each(controls, _CONTROL_OPTIONS)),
        *((ImagePrompt, one) for one in _each(prompts, _PROMPT_OPTIONS)),
    ]
    found: list[Control | ImagePrompt] = []
    for kind, fields in asked:
        model, encoder = fields.pop("model"), fields.pop("encoder", None)
        sees = None if encoder is None else Path(encoder).expanduser()
        found.append(kind(model=pipe.load_control(_place(model), image_encoder=sees), **fields))
    return found


def _each(given: Given, options: Options) -> Iterator[dict[str, Any]]:
    """The fields of each net that was asked for, all of one kind.

    Raises:
        UsageError: options without a net, a net without a picture, or another number of them.
    """
    by_field = {field: f"--{name.replace('_', '-')}" for name, (field, _) in options.items()}
    nets = given["model"] or []
    values = {field: found for field, found in given.items() if found and field != "model"}
    if values and not nets:
        raise UsageError(
            f"{by_field[next(iter(values))]} without {by_field['model']}",
            expected="the net that reads the picture",
            fix=f"Pass it too: {by_field['model']} FILE",
        )
    several = (
        options is _PROMPT_OPTIONS and len(nets) == 1
    )  # pictures that are seen together, and their masks
    for field, found in values.items():
        if len(found) not in (1, len(nets)) and not (several and field in ("image", "mask_image")):
            raise UsageError(
                f"{by_field[field]} is given {len(found)} times for {len(nets)} of {by_field['model']}",
                expected="once, or once for each",
                fix=f"Give it as often as the nets: {by_field[field]} VALUE",
            )
    if nets and "image" not in values:
        raise UsageError(
            f"{by_field['model']} without {by_field['image']}",
            expected="a picture for it to read",
            fix=f"Pass it too: {by_field['image']} FILE",
        )
    for number, net in enumerate(nets):
        fields: dict[str, Any] = {field: found[number % len(found)] for field, found in values.items()}
        if several:
            fields |= {field: list(values[field]) for field in ("image", "mask_image") if field in values}
        yield {"model": net, **fields}


def _place(net: str) -> str | Path:
    """The path of what is there; anything else as it is, which may be a model of a hub."""
    path = Path(os.path.expanduser(net))
    return path if os.path.exists(path) else net
