"""The options of pictures that steer: ControlNets, and how much each of them counts."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ..engines.errors import UsageError

if TYPE_CHECKING:
    from ..runtime.controls.control import Control
    from ..runtime.pipeline import Pipeline

# An option -> the field of `Control` that it has, and how it is given.
_OPTIONS: Mapping[str, tuple[str, Any]] = {
    "control_net": (
        "model",
        Annotated[list[str] | None, Option(help="A ControlNet: its file, folder or ORG/NAME.")],
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
    "control_resize": (
        "resize_mode",
        Annotated[list[str] | None, Option(help="stretch (the default), crop, pad.")],
    ),
    "control_mask": (
        "mask_image",
        Annotated[list[str] | None, Option(help="White where inpaint draws anew.", metavar="FILE")],
    ),
}
_CANNY = Annotated[bool, Option("--canny", help="The same as --control-preparation canny.")]

OpenControls = Callable[["Pipeline"], "list[Control]"]


def with_control_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `controls` (an `OpenControls`) the options above."""

    @wraps(command)
    def with_options(**given: Any) -> None:
        fields = {field: given.pop(name) for name, (field, _) in _OPTIONS.items()}
        if given.pop("canny"):
            fields["preparation"] = ["canny"]
        command(**given, controls=partial(_controls, given=fields))

    signature = inspect.signature(command, eval_str=True)
    own = [item for name, item in signature.parameters.items() if name != "controls"]
    kind = inspect.Parameter.KEYWORD_ONLY
    options = [
        *(inspect.Parameter(name, kind, default=None, annotation=how) for name, (_, how) in _OPTIONS.items()),
        inspect.Parameter("canny", kind, default=False, annotation=_CANNY),
    ]
    setattr(with_options, "__signature__", signature.replace(parameters=[*own, *options]))  # noqa: B010
    return with_options


def _controls(pipe: Pipeline, given: Mapping[str, Sequence[Any] | None]) -> list[Control]:
    """The controls of a command; their ControlNets are loaded."""
    from ..runtime.controls.control import Control

    nets = given["model"] or []
    values = {field: found for field, found in given.items() if found and field != "model"}
    if values and not nets:
        raise UsageError(
            f"{_option(next(iter(values)))} without a ControlNet",
            expected="the net that reads the picture",
            fix="Pass it too: --control-net FILE",
        )
    for field, found in values.items():
        if len(found) not in (1, len(nets)):
            raise UsageError(
                f"{_option(field)} is given {len(found)} times for {len(nets)} ControlNets",
                expected="once, or once for each",
                fix=f"Give it as often as the nets: {_option(field)} VALUE",
            )
    if nets and "image" not in values:
        raise UsageError(
            "--control-net without --control-image",
            expected="a picture for it to read",
            fix="Pass it too: --control-image FILE",
        )
    named = {net: pipe.load_control(_place(net)) for net in nets}
    return [
        Control(
            model=named[net],
            **{field: found[number % len(found)] for field, found in values.items()},
        )
        for number, net in enumerate(nets)
    ]


def _place(net: str) -> str | Path:
    """The path of what is there; anything else as it is, which may be a model of a hub."""
    path = Path(os.path.expanduser(net))
    return path if os.path.exists(path) else net


def _option(field: str) -> str:
    return next(f"--{name.replace('_', '-')}" for name, (found, _) in _OPTIONS.items() if found == field)
