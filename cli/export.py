"""`latentrt export`: a checkpoint becomes a package."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from .models import FewSteps, LoraLenient, PredictionType, TinyVae, Vae, lora_files
from .progress import progress_bar
from .shown import show

if TYPE_CHECKING:
    from ..checkpoints.precision.islands import Found
    from ..export.verify import Comparison


def export(
    checkpoint: Annotated[
        str,
        Argument(
            help="A diffusers folder, a .safetensors file, or a model of a hub (ORG/NAME): SD 1.x and 2.x,"
            " SDXL and its refiner, LCM, Turbo, inpainting, Stable unCLIP."
        ),
    ],
    output: Annotated[Path, Option("--output", "-o", help="The package folder to write.")],
    dtype: Annotated[Literal["fp16", "fp32"], Option(help="fp16 for GPUs, fp32 for CPUs.")] = "fp16",
    verify: Annotated[
        bool,
        Option(
            "--verify", help="Compare each net with torch; below the bar fails. Needs the extra [export]."
        ),
    ] = False,
    trace: Annotated[
        bool,
        Option(
            "--trace", help="Trace the nets with torch, even if their graphs ship. Needs the extra [export]."
        ),
    ] = False,
    vae: Vae = None,
    tiny_vae: TinyVae = None,
    prediction_type: PredictionType = None,
    loras: Annotated[
        list[Any] | None,
        lora_files("--lora", "An adapter's file that becomes part of the weights, and how strongly."),
    ] = None,
    lora_lenient: LoraLenient = False,
    few_steps: FewSteps = None,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace an existing package once the new one is complete.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Turn a checkpoint into a package of graphs and weights.

    The graphs of architectures in circulation ship. Others are traced, which needs the extra [export].
    """
    from ..checkpoints.find import locate
    from ..checkpoints.templates import archive
    from ..engines.hub import snapshot
    from ..export.export import export_package

    began = perf_counter()
    comparisons: list[Comparison] = []
    ranges: list[Found] = []
    notes: list[str] = []
    with progress_bar(enabled=not as_json) as advance:
        found = locate(
            checkpoint, progress=lambda now: advance(f"downloading {now.file}", now.done, now.total)
        )
        package = export_package(
            snapshot(found),
            output,
            dtype=dtype,
            verify=verify,
            overwrite=overwrite,
            vae=vae,
            tiny_vae=tiny_vae,
            prediction_type=prediction_type,
            templates=None if trace else archive.SHIPPED,
            loras=loras or (),
            allow_unused=lora_lenient,
            few_steps=few_steps,
            progress=lambda stage: advance(stage.stage, stage.index, stage.total),
            report=comparisons.append,
            report_islands=ranges.append,
            note=notes.append,
        )
    seconds = perf_counter() - began
    if as_json:
        found = {"ranges": list(map(asdict, ranges)), "verify": list(map(asdict, comparisons))}
        print(json.dumps({"package": str(output), "seconds": seconds, **found, "notes": notes}))
        return
    for line in (*notes, *map(_range_line, ranges), *map(_comparison_line, comparisons)):
        show(line)
    size = sum(record.size for record in package.manifest.files.values())
    show(f"{output}  ({size / 1e6:.1f} MB in {seconds:.0f} s)")


def _range_line(found: Found) -> str:
    islands = f"{len(found.islands) or 'no'} fp32 island{'' if len(found.islands) == 1 else 's'}"
    where = f" (largest value {found.largest:.1e} in {found.where})" if found.where else ""
    return f"{found.component}: {islands}{where}"


def _comparison_line(found: Comparison) -> str:
    return (
        f"{found.net}.{found.output}: relative L2 {found.relative_l2:.1e},"
        f" max error {found.max_error:.1e}, PSNR {found.psnr:.1f} dB"
    )
