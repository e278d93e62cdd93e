"""`latentrt generate`: a prompt becomes a picture file."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from .progress import progress_bar

if TYPE_CHECKING:
    from ..runtime.pipeline import Pipeline
    from ..runtime.result import Result


def generate(
    prompt: Annotated[str, Argument(help="What to draw.")],
    output: Annotated[
        Path | None,
        Option("--output", "-o", help="File to write (.png, .jpg, .webp). Default: prompt and seed."),
    ] = None,
    model: Annotated[
        str, Option("--model", "-m", help="The shipped model `demo`, or a package folder.")
    ] = "demo",
    negative_prompt: Annotated[str | None, Option("--negative-prompt", "-n", help="What to avoid.")] = None,
    height: Annotated[int | None, Option("--height", "-H", help="Pixels. Default: the model's.")] = None,
    width: Annotated[int | None, Option("--width", "-W", help="Pixels. Default: the model's.")] = None,
    steps: Annotated[
        int | None, Option("--steps", help="Number of inference steps. Default: the model's.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        Option("--guidance-scale", "--cfg-scale", help="1 or less is off. Default: the model's."),
    ] = None,
    guidance_rescale: Annotated[float, Option(help="0 (off) to 1, against overexposure.")] = 0.0,
    sampler: Annotated[
        str | None,
        Option("--sampler", help="`latentrt inspect --samplers` lists them. Default: the model's."),
    ] = None,
    eta: Annotated[float, Option(help="DDIM's noise: 0 is deterministic, 1 is DDPM.")] = 0.0,
    seed: Annotated[int | None, Option("--seed", "-s", help="Default: random.")] = None,
    rng: Annotated[str, Option(help="Whose noise the seed means: torch-cpu, torch-cuda.")] = "torch-cpu",
    count: Annotated[
        int, Option("--count", "-b", help="Pictures to draw, with seeds counting up from --seed.")
    ] = 1,
    backend: Annotated[
        str, Option(help="auto, onnxruntime, onnxruntime-cuda, tensorrt, tensorrt-rtx.")
    ] = "auto",
    threads: Annotated[int | None, Option(help="CPU threads. Default: all.")] = None,
    no_metadata: Annotated[
        bool, Option("--no-metadata", help="Leave prompt and parameters out of the file.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Draw a prompt and write the picture."""
    from ..runtime.picture import check_target
    from ..runtime.pipeline import Pipeline

    if output is not None:
        check_target(output)  # before minutes of drawing
    began = perf_counter()
    with (
        progress_bar(enabled=not as_json) as advance,
        Pipeline.open(model, backend=backend, threads=threads) as pipe,
    ):
        opened = perf_counter() - began

        def on_step(pipe: Pipeline, index: int, timestep: float, values: dict[str, Any]) -> None:
            advance("denoising", index + 1, values["total"])

        result = pipe(
            prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            sampler=sampler,
            eta=eta,
            seed=seed,
            rng=rng,
            num_images_per_prompt=count,
            # Someone who looks on costs a device one wait per step.
            callback_on_step_end=on_step if sys.stderr.isatty() and not as_json else None,
        )
    saving = perf_counter()
    paths = [_path(output, prompt, result, index) for index in range(count)]
    for index, path in enumerate(paths):
        result.save(path, index, metadata=not no_metadata)
    seconds = {"open": opened, **result.seconds, "save": perf_counter() - saving}
    _report(result, paths, {**seconds, "total": perf_counter() - began}, as_json=as_json)


def _path(output: Path | None, prompt: str, result: Result, index: int) -> Path:
    """Where picture `index` goes; several pictures are numbered by their seeds."""
    seed = result.request.seeds[index]
    if output is None:
        words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "picture"
        return Path(f"{words}-{seed}.png")
    return output if len(result.request.seeds) == 1 else output.with_stem(f"{output.stem}-{seed}")


def _report(result: Result, paths: list[Path], seconds: dict[str, float], *, as_json: bool) -> None:
    request = result.request
    if as_json:
        pictures = [{"path": str(path), **result.record(i)} for i, path in enumerate(paths)]
        print(json.dumps({"pictures": pictures, "seconds": seconds}))
        return
    for path, seed in zip(paths, request.seeds, strict=True):
        print(f"{path}  ({request.width}x{request.height}, seed {seed})")
    stages = " · ".join(f"{name.replace('_', ' ')} {value:.2f} s" for name, value in seconds.items())
    print(stages, file=sys.stderr)
