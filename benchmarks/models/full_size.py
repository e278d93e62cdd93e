"""Full-size models: `python -m latentrt.benchmarks.models.full_size FOLDER --out FILE` says what they take.

An exact-shape random-weight checkpoint goes to FOLDER/<recipe>, its packages to FOLDER/<recipe>-<dtype>,
where `models.find_model` finds them. Every stage is a process of its own, and so each peak memory its own.
Random weights give the right time and memory; the picture means nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from ...engines.errors import ModelError
from ..machine import clocks, describe_machine
from ..process import SideError, run
from ..records import Document, Row
from ..sides.contract import OURS
from ..words import lines

RECIPE = "sd15"
DTYPES = ("fp16", "fp32")
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


def run_stage(name: str, module: str, *arguments: str) -> dict[str, Any]:
    """Run `python -m MODULE ARGUMENTS`.

    Returns:
        `wall_seconds`; `cpu_seconds` and `peak_rss`, in bytes, of the process; and what is in the last line
        it printed, if that is a JSON object.

    Raises:
        ModelError: it failed; with the end of what it printed on stderr.
    """
    began = perf_counter()
    try:
        *printed, last = run(["-c", _STAGE, module, *arguments])
    except SideError as error:
        raise ModelError(
            f"{name} failed: {error.reason}",
            expected="a stage that ends well",
            fix="Mend what it names, and run it again; stages that were complete stay.",
        ) from error
    own: dict[str, Any] = json.loads(printed[-1]) if printed and printed[-1].startswith("{") else {}
    own.pop("package", None)  # a path of this machine
    return {"wall_seconds": perf_counter() - began, **own, **json.loads(last)}


@contextmanager
def complete(folder: Path) -> Generator[Path]:
    """A place to make the folder in; it is moved here if the block ends well, else nothing is left."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
        unfinished = Path(beside) / folder.name
        yield unfinished
        unfinished.rename(folder)


def make_checkpoint(recipe: str, checkpoint: Path) -> dict[str, Any]:
    """Write the folder of a recipe of `checkpoints.py`, complete or not at all. As `run_stage`."""
    with complete(checkpoint) as unfinished:
        module = "latentrt.benchmarks.models.checkpoints"
        return run_stage("make checkpoint", module, recipe, str(unfinished))


def export(checkpoint: Path, package: Path, dtype: str, *flags: str) -> dict[str, Any]:
    """`latentrt export`, which writes the package completely or not at all. As `run_stage`."""
    arguments = ["export", str(checkpoint), "-o", str(package), "--dtype", dtype, "--json", *flags]
    return run_stage(f"export {dtype}", "latentrt.cli", *arguments)


def measure_export(
    folder: Path,
    recipe: str = RECIPE,
    dtypes: Sequence[str] = DTYPES,
    *,
    said: Callable[[str], None] = lambda line: None,
) -> Document:
    """Rows of time and of peak memory: of making the checkpoint, if it is not there yet, and of each export.

    Models go to `folder`; `said` gets a line for each stage. Raises ModelError if no checkpoint can be made.
    """
    rows: list[Row] = []
    machine = describe_machine()
    checkpoint = folder / recipe
    if not checkpoint.exists():
        said(f"making the checkpoint {recipe}")
        rows += _rows("make checkpoint", {"recipe": recipe}, make_checkpoint(recipe, checkpoint), machine)
    for dtype in dtypes:
        said(f"exporting {recipe} as {dtype}")
        case = {"recipe": recipe, "dtype": dtype, "flags": list(FLAGS)}
        try:
            found = export(checkpoint, folder / f"{recipe}-{dtype}", dtype, *FLAGS)
            rows += _rows("export", case, found, machine)
        except ModelError as error:
            row = Row(side=OURS, workload="export", case=case, status="FAILED", reason=error.found)
            rows.append(row)
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    return Document(
        benchmark="export",
        model={"name": recipe, "checkpoint_bytes": size},
        settings={"recipe": recipe, "dtypes": list(dtypes), "flags": list(FLAGS)},
        rows=tuple(rows),
        machine=machine,
    )


def _rows(
    workload: str, case: Mapping[str, Any], stage: Mapping[str, Any], machine: Mapping[str, Any]
) -> list[Row]:
    figures = dict(stage)
    seconds, peak = figures.pop("wall_seconds"), float(figures.pop("peak_rss"))
    row = Row(side=OURS, workload=workload, case=case, stamp={**machine, **clocks()})
    return [
        replace(row, rounds=((seconds,),), figures=figures),
        replace(row, workload=f"{workload} peak memory", unit="B", rounds=((peak,),)),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Make and export; print a line for each row, write the document with `--out`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    document = measure_export(options.folder, options.recipe, options.dtypes, said=print)
    print("\n".join(lines(document)))
    if options.out:
        document.write(options.out)
    if document.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
