"""Full-size models: `python -m latentrt.benchmarks.models.full_size FOLDER --out FILE` says what they take.

An exact-shape random-weight checkpoint goes to FOLDER/<recipe>, its packages to FOLDER/<recipe>-<dtype>,
where `models.find_model` finds them. Every stage is a process of its own, and so each peak memory its own.
Random weights give the right time and memory; the picture means nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from ...engines.errors import ModelError
from ..machine import clocks, describe_machine
from ..process import SideError, run
from ..records import Document, Row
from ..sides.contract import OURS

RECIPE = "sd15"
FLAGS = ("--verify", "--overwrite")  # of `latentrt export`
# resource's high-water mark covers all children so far, so each stage runs below a child of its own
_WATCH = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True)
if done.returncode:
    sys.exit(max(done.returncode, 1))
used = resource.getrusage(resource.RUSAGE_CHILDREN)
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps([used.ru_maxrss * unit, used.ru_utime + used.ru_stime, done.stdout]))
"""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A process: seconds by the clock and of the CPU, its peak memory in bytes, and the JSON it printed."""

    seconds: float
    cpu_seconds: float
    peak_rss: int
    figures: Mapping[str, Any] = field(default_factory=dict[str, Any])


def run_stage(name: str, arguments: Sequence[str]) -> Stage:
    """Run `python ARGUMENTS`; if the last line it prints is a JSON object, those are its figures.

    Raises ModelError if it fails, with the end of what it printed on stderr.
    """
    began = perf_counter()
    try:
        lines = run(["-c", _WATCH, sys.executable, *arguments])
    except SideError as error:
        raise ModelError(
            f"{name} failed: {error.reason}",
            expected="a stage that ends well",
            fix="Mend what it names, and run it again; stages that were complete stay.",
        ) from error
    seconds = perf_counter() - began
    peak, cpu, output = json.loads(lines[-1])
    printed = str(output).strip().splitlines()
    figures: dict[str, Any] = json.loads(printed[-1]) if printed and printed[-1].startswith("{") else {}
    figures.pop("package", None)  # a path of this machine
    return Stage(seconds=seconds, cpu_seconds=cpu, peak_rss=peak, figures=figures)


def make_checkpoint(recipe: str, checkpoint: Path) -> Stage:
    """Write the folder of a recipe of `checkpoints.py`, complete or not at all. Raises ModelError."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{checkpoint.name}-", dir=checkpoint.parent) as folder:
        unfinished = Path(folder) / checkpoint.name
        arguments = ["-m", "latentrt.benchmarks.models.checkpoints", recipe, str(unfinished)]
        stage = run_stage("make checkpoint", arguments)
        unfinished.rename(checkpoint)
    return stage


def export(checkpoint: Path, package: Path, dtype: str, *flags: str) -> Stage:
    """`latentrt export`, which writes the package completely or not at all. Raises ModelError."""
    verb = ["-m", "latentrt.cli", "export", str(checkpoint), "-o", str(package), "--dtype", dtype, "--json"]
    return run_stage(f"export {dtype}", [*verb, *flags])


def measure_export(
    folder: Path,
    recipe: str = RECIPE,
    dtypes: Sequence[str] = ("fp16", "fp32"),
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
        case = {"recipe": recipe, "dtype": dtype, "flags": list(FLAGS)}
        said(f"exporting {recipe} as {dtype}")
        try:
            stage = export(checkpoint, folder / f"{recipe}-{dtype}", dtype, *FLAGS)
            rows += _rows("export", case, stage, machine)
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


def _rows(workload: str, case: Mapping[str, Any], stage: Stage, machine: Mapping[str, Any]) -> list[Row]:
    row = Row(
        side=OURS,
        workload=workload,
        case=case,
        rounds=((stage.seconds,),),
        figures={**stage.figures, "cpu_seconds": stage.cpu_seconds},
        stamp={**machine, **clocks()},
    )
    peak = float(stage.peak_rss)
    return [row, replace(row, workload=f"{workload} peak memory", unit="B", rounds=((peak,),), figures={})]


def main(arguments: Sequence[str] | None = None) -> None:
    """Make and export; print a line for each row, write the document with `--out`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--dtypes", nargs="+", default=["fp16", "fp32"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    document = measure_export(options.folder, options.recipe, options.dtypes, said=print)
    for row in document.rows:
        found = f"{row.samples[0]:.4g} {row.unit}" if row.samples else f"{row.status}: {row.reason}"
        print(f"{row.workload:<28} {row.case.get('dtype', ''):<5} {found}")
    if options.out:
        document.write(options.out)
    if document.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
