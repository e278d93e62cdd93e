"""Full-size models: `python -m latentrt.benchmarks.models.full_size FOLDER --out FILE` measures exports.

An exact-shape random-weight checkpoint goes to FOLDER/<recipe>, its packages to FOLDER/<recipe>-<dtype>,
where `models.find_model` finds them. Every stage is a process of its own, and so each peak memory its own.
Random weights give the right time and memory; the picture means nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from ...checkpoints.beside import beside
from ...engines.errors import ModelError
from ..machine import clocks, describe_machine
from ..process import SideError, run
from ..records import Document, Row
from ..sides.contract import OURS
from ..words import lines

FLAGS = ("--verify", "--overwrite")  # of `latentrt export`
# `python -m`, and then a line about the process itself
_STAGE = """
import json, runpy, sys, time
from latentrt.benchmarks.machine import resident_bytes
module, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as end:
    if end.code:
        raise
print(json.dumps({"cpu_seconds": time.process_time(), "peak_rss": resident_bytes()[1]}))
"""


def run_stage(name: str, module: str, *arguments: str) -> dict[str, float]:
    """Run `python -m MODULE ARGUMENTS`: `wall_seconds`, the process's `cpu_seconds`, its `peak_rss` in bytes.

    Raises:
        ModelError: it failed; with the end of what it printed on stderr.
    """
    began = perf_counter()
    try:
        *_, last = run(["-c", _STAGE, module, *arguments])
    except SideError as error:
        raise ModelError(
            f"{name} failed: {error.reason}",
            expected="a stage that ends well",
            fix="Mend what it names, and run it again; stages that were complete stay.",
        ) from error
    return {"wall_seconds": perf_counter() - began, **json.loads(last)}


def make_checkpoint(recipe: str, checkpoint: Path) -> None:
    """Write the folder of a recipe of `checkpoints.py`, complete or not at all. Raises ModelError."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with beside(checkpoint) as folder:
        unfinished = folder / recipe
        run_stage("make checkpoint", "latentrt.benchmarks.models.checkpoints", recipe, str(unfinished))
        unfinished.rename(checkpoint)


def export(checkpoint: Path, package: Path, dtype: str, *flags: str) -> dict[str, float]:
    """`latentrt export`, which writes the package completely or not at all. As `run_stage`."""
    arguments = ["export", str(checkpoint), "-o", str(package), "--dtype", dtype, *flags]
    return run_stage(f"export {dtype}", "latentrt.cli", *arguments)


def measure_export(folder: Path, recipe: str, dtypes: Sequence[str]) -> Document:
    """Rows of time and of peak memory of each export; the checkpoint is made if it is not there yet.

    Models go to `folder`; a line for each stage is printed. Raises ModelError if no checkpoint can be made.
    """
    rows: list[Row] = []
    checkpoint = folder / recipe
    if not checkpoint.exists():
        print(f"making the checkpoint {recipe}")
        make_checkpoint(recipe, checkpoint)
    for dtype in dtypes:
        print(f"exporting {recipe} as {dtype}")
        case = {"recipe": recipe, "dtype": dtype, "flags": list(FLAGS)}
        row = Row(side=OURS, workload="export", case=case, stamp={**describe_machine(), **clocks()})
        try:
            found = export(checkpoint, folder / f"{recipe}-{dtype}", dtype, *FLAGS)
        except ModelError as error:
            rows.append(replace(row, status="FAILED", reason=error.found))
            continue
        figures = {"cpu_seconds": found["cpu_seconds"]}
        rows.append(replace(row, rounds=((found["wall_seconds"],),), figures=figures))
        if found["peak_rss"]:  # Linux tells it
            rows.append(replace(row, workload="export peak memory", unit="B", rounds=((found["peak_rss"],),)))
    return Document(
        benchmark="export",
        model={"name": recipe},
        settings={"recipe": recipe, "dtypes": list(dtypes), "flags": list(FLAGS)},
        rows=tuple(rows),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Make and export; print a line for each row, write the document with `--out`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", default="sd15")
    parser.add_argument("--dtypes", nargs="+", default=["fp16", "fp32"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    document = measure_export(options.folder, options.recipe, options.dtypes)
    print("\n".join(lines(document)))
    if options.out:
        document.write(options.out)
    if document.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
