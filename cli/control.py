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
from .shown import tell

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
            Option(
                help="What makes a map of the picture: canny, invert, blur, tile, …; none for a ready map."
            ),
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
_CANNY = Annotated[bool, Option("--canny", help="The same as --control-preparation canny, for one net.")]
_READY = "none"  # as a preparation, on the command line

Given = Mapping[str, Sequence[Any] | None]
# Of a pipeline, and of what a picture's record says of its controls (None for a new picture).
OpenControls = Callable[["Pipeline", object], "list[Control | ImagePrompt]"]


def with_control_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `controls` (an `OpenControls`) the options above."""

    @wraps(command)
    def with_options(**given: Any) -> None:
        controls, prompts = (
            {field: given.pop(name) for name, (field, _) in options.items()}
            for options in (_CONTROL_OPTIONS, _PROMPT_OPTIONS)
        )
        controls["preparation"] = _preparations(controls, canny=bool(given.pop("canny")))
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


def _preparations(controls: Given, *, canny: bool) -> list[str | None] | None:
    """What makes a map of each picture; None stands for a ready one. Raises UsageError for odd options."""
    given = controls["preparation"]
    if not canny:
        return [None if one == _READY else one for one in given] if given else None
    nets = controls["model"] or []
    if given or len(nets) > 1:
        raise UsageError(
            "--canny with --control-preparation" if given else f"--canny with {len(nets)} of --control-net",
            expected="what makes a map of each picture, said once",
            fix="Say it for each net, in their order: --control-preparation canny --control-preparation none",
        )
    if not nets:
        raise UsageError(
            "--canny without --control-net",
            expected="the net that reads the edges",
            fix="Pass it too: --control-net FILE",
        )
    return ["canny"]


def _opened(pipe: Pipeline, steered: object, controls: Given, prompts: Given) -> list[Control | ImagePrompt]:
    """The controls of a command; their nets are loaded.

    What the options are silent of is as the record `steered` has it, if it has as many of the kind.
    """
    from ..runtime.controls.control import Control
    from ..runtime.controls.image_prompt import ImagePrompt
    from ..runtime.recorded_controls import recorded_settings

    kinds: list[tuple[type[Control | ImagePrompt], Given, Options]] = [
        (Control, controls, _CONTROL_OPTIONS),
        (ImagePrompt, prompts, _PROMPT_OPTIONS),
    ]
    found: list[Control | ImagePrompt] = []
    names: dict[tuple[str, str | None], str] = {}  # by the net and what it sees through
    for kind, given, options in kinds:
        asked = list(_each(given, options))
        before = recorded_settings(steered, kind)
        for number, fields in enumerate(asked):
            net = fields.pop("model"), fields.pop("encoder", None)
            names[net] = names.get(net) or load_control(pipe, *net)
            usual = before[number] if len(before) == len(asked) else {}
            if "preparation" in fields:
                usual.pop("settings", None)  # another one has others
            found.append(kind(model=names[net], **{**usual, **fields}))
    return found


def load_control(pipe: Pipeline, net: str, encoder: str | None = None) -> str:
    """Load a control under its name; under one with a number where another one has that."""
    from ..adapters.folder import NameTakenError

    sees = None if encoder is None else Path(encoder).expanduser()
    path = os.path.expanduser(net)
    place = path if os.path.exists(path) else net  # which may be a model of a hub, or one that ships
    try:
        return pipe.load_control(place, image_encoder=sees)
    except NameTakenError as error:
        free = pipe.controls.free_name(error.name)
        tell(f"{net} is called {free} here, as another control is called {error.name}")
        return pipe.load_control(place, free, image_encoder=sees)


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
