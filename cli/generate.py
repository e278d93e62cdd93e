"""`latentrt generate`: prompts, and perhaps a picture, become picture files."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, cast

from typer import Argument, Option

from ..engines.errors import UsageError
from ..runtime.request.parameters import PARAMETERS, Parameter
from .progress import progress_bar

if TYPE_CHECKING:
    from ..runtime.pipeline import Pipeline
    from ..runtime.request.request import Request
    from ..runtime.result import Result


_OUTPUT = "File to write (.png, .jpg, .webp; .npy for the latents). Default: prompt and seed."
_MODEL = "The shipped model `demo`, or a package folder."
_REFINER_AT = "The share of the schedule at which the refiner takes over. Default: 0.8."
_PREVIEW = "Write what can be seen so far to this file, after every step."
_BACKEND = "auto, onnxruntime, onnxruntime-cuda, tensorrt, tensorrt-rtx."
_THREADS = "CPU threads; at most, and by default, one for each processor that may be used."
_NO_METADATA = "Leave prompt and parameters out of the file."


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


@with_parameters
def generate(
    prompt: Annotated[list[str], Argument(help="What to draw; several prompts are one batch.")],
    output: Annotated[Path | None, Option("--output", "-o", help=_OUTPUT)] = None,
    model: Annotated[str, Option("--model", "-m", help=_MODEL)] = "demo",
    refiner: Annotated[str | None, Option(help="A second package, which ends what --model begins.")] = None,
    refiner_at: Annotated[float | None, Option(help=_REFINER_AT)] = None,
    grid: Annotated[bool, Option("--grid", help="Write one file with all pictures side by side.")] = False,
    preview: Annotated[Path | None, Option(metavar="FILE", help=_PREVIEW)] = None,
    backend: Annotated[str, Option(help=_BACKEND)] = "auto",
    threads: Annotated[int | None, Option(help=_THREADS)] = None,
    no_metadata: Annotated[bool, Option("--no-metadata", help=_NO_METADATA)] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
    **parameters: Any,
) -> None:
    """Draw prompts and write the pictures."""
    from ..runtime.pipeline import Pipeline

    if refiner is None and refiner_at is not None:
        raise UsageError("--refiner-at alone", expected="a refiner", fix="Pass --refiner PACKAGE as well.")
    saver = _Saver(output, as_grid=grid, metadata=not no_metadata)
    chosen = {name: value for name, value in parameters.items() if value is not None}
    chosen["output_type"] = saver.output_type
    began = perf_counter()
    with ExitStack() as stack:
        advance = stack.enter_context(progress_bar(enabled=not as_json))
        names = [model] if refiner is None else [model, refiner]
        pipes = [stack.enter_context(Pipeline.open(name, backend=backend, threads=threads)) for name in names]
        opened = perf_counter() - began
        # Someone who looks on costs a device one wait per step.
        watched = preview is not None or (sys.stderr.isatty() and not as_json)
        callback = _on_step(advance, preview) if watched else None
        result = _draw(pipes, prompt, refiner_at, {**chosen, "callback_on_step_end": callback})
    saving = perf_counter()
    paths = saver.save(result)
    seconds = {"open": opened, **result.seconds, "save": perf_counter() - saving}
    _report(result, paths, {**seconds, "total": perf_counter() - began}, as_json=as_json)


def _draw(pipes: list[Pipeline], prompts: list[str], at: float | None, parameters: dict[str, Any]) -> Result:
    from ..runtime.refine import refine

    if len(pipes) == 1:
        return pipes[0](prompts, **parameters)
    return refine(pipes[0], pipes[1], prompts, **({} if at is None else {"at": at}), **parameters)


def _on_step(advance: Callable[[str, int, int], None], preview: Path | None) -> Callable[..., None]:
    """Move the bar, and write the pictures so far."""
    from ..runtime.pictures.write import check_target, grid, save_picture

    if preview is not None:
        check_target(preview)

    def on_step(pipe: Pipeline, index: int, timestep: float, values: dict[str, Any]) -> None:
        advance("denoising", index + 1, values["total"])
        if preview is not None:
            import numpy as np

            save_picture(preview, grid([np.asarray(image) for image in values["step"].preview("fast")]))

    return on_step


class _Saver:
    """Where results go: a file per picture, one for all (`as_grid`), or their latents (.npy)."""

    def __init__(self, output: Path | None, *, as_grid: bool, metadata: bool) -> None:
        from ..runtime.pictures.write import check_target

        self._output, self._as_grid, self._metadata = output, as_grid, metadata
        self._latents = output is not None and output.suffix == ".npy"
        if self._latents and as_grid:
            raise UsageError("a grid of latents", expected="a picture file", fix="Leave --grid out.")
        if output is not None:  # before minutes of drawing
            check_target(output.with_suffix(".png") if self._latents else output)

    @property
    def output_type(self) -> str:
        """What the pipeline is to return."""
        return "latent" if self._latents else "np" if self._as_grid else "pil"

    def save(self, result: Result) -> list[Path]:
        """Write everything; the paths, one per picture or one for all."""
        from ..runtime.pictures.write import grid, save_latents, save_picture

        request = result.request
        if self._latents:
            assert self._output is not None
            save_latents(self._output, cast(Any, result.images))
            return [self._output]
        if self._as_grid:
            path = self._output or _named(request.prompts[0], request.seeds[0])
            infotext, record = (result.infotext(), result.record()) if self._metadata else (None, None)
            save_picture(path, grid(cast(Any, result.images)), infotext=infotext, record=record)
            return [path]
        paths = self._paths(request)
        for index, path in enumerate(paths):
            result.save(path, index, metadata=self._metadata)
        return paths

    def _paths(self, request: Request) -> list[Path]:
        """Where pictures go; several are numbered by their seeds, and by their place if seeds are equal."""
        seeds, output = request.seeds, self._output
        if output is not None and len(seeds) == 1:
            return [output]
        distinct = len(set(seeds)) == len(seeds)
        paths: list[Path] = []
        for index, (prompt, seed) in enumerate(zip(request.prompts, seeds, strict=True)):
            path = _named(prompt, seed) if output is None else output.with_stem(f"{output.stem}-{seed}")
            paths.append(path if distinct else path.with_stem(f"{path.stem}-{index}"))
        return paths


def _named(prompt: str, seed: int) -> Path:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "picture"
    return Path(f"{words}-{seed}.png")


def _report(result: Result, paths: list[Path], seconds: dict[str, float], *, as_json: bool) -> None:
    request = result.request
    if as_json:
        files = paths if len(paths) == len(request.seeds) else paths * len(request.seeds)
        pictures = [{"path": str(path), **result.record(i)} for i, path in enumerate(files)]
        print(json.dumps({"pictures": pictures, "seconds": seconds}))
        return
    for path, seed in zip(paths, request.seeds, strict=False):
        print(f"{path}  ({request.width}x{request.height}, seed {seed})")
    stages = " · ".join(f"{name.replace('_', ' ')} {value:.2f} s" for name, value in seconds.items())
    print(stages, file=sys.stderr)
