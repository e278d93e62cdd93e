"""`latentrt quantise`: a package whose UNet is in eight bits, or whose weights are in four."""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter
from typing import Annotated

from typer import Argument, Option

from .progress import progress_bar
from .shown import show


def quantise(
    package: Annotated[str, Argument(help="The shipped model, demo, or a package folder.")],
    output: Annotated[Path, Option("--output", "-o", help="The package folder to write.")],
    to: Annotated[
        str,
        Option(
            help="int8: products of int8 weights and int8 data. fp8: the same in e4m3, for NVIDIA GPUs of 8.9"
            " and above. int4: weights alone, in blocks of 64."
        ),
    ] = "int8",
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace an existing package once the new one is complete.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Round the UNet of a package: smaller and faster, and not the same pictures.

    Ranges are measured on pictures that the package draws, and the result is compared on others; further off
    than the format's bars is an error. No adapter changes a rounded UNet.
    """
    from ..engines.package import Package
    from ..export.quantised.write import quantise_package
    from ..runtime.model import SHIPPED

    began = perf_counter()
    with progress_bar(enabled=not as_json) as advance:
        made = quantise_package(
            Package.open(SHIPPED.get(package, Path(package))),
            output,
            format=to,
            overwrite=overwrite,
            progress=lambda stage: advance(stage.stage, stage.index, stage.total),
        )
    seconds = perf_counter() - began
    facts = made.package.manifest.quantised
    if as_json:
        print(json.dumps({"package": str(output), "seconds": seconds, **facts}))
        return
    left = len(facts["left_out"])
    show(f"{len(facts['rounded'])} products of the UNet in {to}, {left} left as they were")
    show(f"relative L2 to the UNet that it was: {made.relative_l2:.2g}; pictures: {made.picture_db:.1f} dB")
    size = sum(record.size for record in made.package.manifest.files.values())
    show(f"{output}  ({size / 1e6:.1f} MB in {seconds:.0f} s)")
