"""The options of `latentrt generate`: those of the command, and one for every parameter of a generation."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from ..runtime.request.parameters import PARAMETERS, Parameter

Prompts = Annotated[list[str], Argument(help="What to draw; several prompts are one batch.")]
Output = Annotated[
    Path | None,
    Option(
        "--output",
        "-o",
        help="File to write (.png, .jpg, .webp; .npy for the latents). Default: prompt and seed.",
    ),
]
Model = Annotated[str, Option("--model", "-m", help="The shipped model `demo`, or a package folder.")]
Refiner = Annotated[str | None, Option(help="A second package, which ends what --model begins.")]
RefinerAt = Annotated[
    float | None, Option(help="The share of the schedule at which the refiner takes over. Default: 0.8.")
]
Grid = Annotated[bool, Option("--grid", help="Write one file with all pictures side by side.")]
Preview = Annotated[
    Path | None, Option(metavar="FILE", help="Write what can be seen so far to this file, after every step.")
]
Backend = Annotated[str, Option(help="auto, onnxruntime, onnxruntime-cuda, tensorrt, tensorrt-rtx.")]
Threads = Annotated[int | None, Option(help="CPU threads. Default: all.")]
NoMetadata = Annotated[bool, Option("--no-metadata", help="Leave prompt and parameters out of the file.")]
AsJson = Annotated[bool, Option("--json", help="Print one JSON object.")]


def with_parameters(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `**parameters` an option for each of `PARAMETERS`.

    typer reads a command's signature; an option that was not given is None, and left to the pipeline.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [item for item in signature.parameters.values() if item.kind is not item.VAR_KEYWORD]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(parameter))
        for name, parameter in PARAMETERS.items()
        if parameter.flags is not None
    ]
    setattr(command, "__signature__", signature.replace(parameters=[*own, *options]))  # noqa: B010
    return command


def _option(parameter: Parameter) -> Any:
    kind = parameter.kind
    option = Option(*(parameter.flags or ()), help=parameter.help, parser=kind.read, metavar=kind.metavar)
    return Annotated[kind.text | None, option]
