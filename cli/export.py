"""`latentrt export`: a checkpoint becomes a package."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from time import perf_counter
from typing import Annotated

from typer import Argument, Option

from ..engines.errors import BackendError
from .progress import progress_bar


class Dtype(str, Enum):
    """Arithmetic of the exported graphs."""

    fp16 = "fp16"
    fp32 = "fp32"


def export(
    checkpoint: Annotated[Path, Argument(help="A diffusers folder of SD 1.x or 2.x.")],
    output: Annotated[Path, Option("--output", "-o", help="The package folder to write.")],
    dtype: Annotated[Dtype, Option(help="fp16 for GPUs, fp32 for CPUs.")] = Dtype.fp16,
    verify: Annotated[
        bool, Option("--verify", help="Compare each net with torch; below the bar fails.")
    ] = False,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace an existing package once the new one is complete.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Turn a checkpoint into a package of graphs and weights. Needs the extra [export]."""
    try:
        import torch  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise BackendError(
            f"export needs torch ({error})",
            expected="the extra [export]",
            fix='Install it: pip install "latentrt[cpu,export]".',
        ) from error
    from ..export.exporter import Progress, export_package

    began = perf_counter()
    with progress_bar(enabled=not as_json) as advance:

        def on_progress(progress: Progress) -> None:
            advance(progress.stage, progress.index, progress.total)

        report = export_package(
            checkpoint, output, dtype=dtype.value, verify=verify, overwrite=overwrite, progress=on_progress
        )
    seconds = perf_counter() - began
    checks = [vars(check) for check in report.checks]
    if as_json:
        print(json.dumps({"package": str(output), "seconds": seconds, "checks": checks}))
        return
    for check in report.checks:
        print(check.format())
    size = sum(record.size for record in report.package.manifest.files.values())
    print(f"{output}  ({size / 1e6:.1f} MB in {seconds:.0f} s)")
