"""Full-size models: `python -m latentrt.benchmarks.models.full_size FOLDER --out FILE` says what they take.

An exact-shape random-weight checkpoint goes to FOLDER/<recipe>, its packages to FOLDER/<recipe>-<dtype>,
where `models.find_model` finds them. Every stage is a process of its own, and so each peak memory its own.
Random weights give the right time and memory; the picture means nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from ...engines.errors import ModelError
from ..machine import clocks, describe_machine
from ..records import Document, Row, short
from ..sides.contract import OURS

Said = Callable[[str], None]

RECIPE = "sd15"
_TAIL = 400  # characters of what a stage printed
# resource's high-water mark covers all children so far, so each stage runs below a child of its own
_WATCH = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
unit = 1 if sys.platform == "darwin" else 1024
cpu = used.ru_utime + used.ru_stime
print(json.dumps([done.returncode, used.ru_maxrss * unit, cpu, done.stdout]))
"""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A process: seconds by the clock and of the CPU, its peak memory in bytes, and what it told as JSON."""

    seconds: float
    cpu_seconds: float
    peak_rss: int
    told: Mapping[str, Any] = field(default_factory=dict[str, Any])


def run_stage(name: str, arguments: Sequence[str]) -> Stage:
    """Run `python ARGUMENTS`; if the last line it prints is a JSON object, that is what it told.

    Raises:
        ModelError: it failed; with the end of what it printed on stderr.
    """
    command = [sys.executable, "-c", _WATCH, sys.executable, *arguments]
    # PYTHONSAFEPATH: `-m` would otherwise put the current folder first, and take modules from there.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    with tempfile.TemporaryFile() as noise:
        began = perf_counter()
        found = subprocess.run(  # noqa: S603
            command, stdout=subprocess.PIPE, stderr=noise, text=True, check=True, env=environment
        )
        seconds = perf_counter() - began
        code, peak, cpu, output = json.loads(found.stdout)
        if code:
            noise.seek(0)
            tail = short(noise.read().decode("utf-8", errors="replace"))[-_TAIL:]
            raise ModelError(
                f"{name} failed with exit code {code}: {tail}",
                expected="a stage that ends well",
                fix="Mend what it names, and run it again; stages that were complete stay.",
            )
    lines = str(output).strip().splitlines()
    told: dict[str, Any] = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    told.pop("package", None)  # a path of this machine
    return Stage(seconds=seconds, cpu_seconds=cpu, peak_rss=peak, told=told)


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
    flags: Sequence[str] = ("--verify", "--overwrite"),
    said: Said = lambda line: None,
) -> Document:
    """Rows of time and of peak memory: of making the checkpoint, if it is not there yet, and of each export.

    Args:
        folder: where models go.
        recipe: of `checkpoints.py`.
        dtypes: of the packages.
        flags: of `latentrt export`.
        said: is told of each stage.

    Raises:
        ModelError: the checkpoint cannot be made.
    """
    rows: list[Row] = []
    machine = describe_machine()
    checkpoint = folder / recipe
    if not checkpoint.exists():
        said(f"making the checkpoint {recipe}")
        rows += _rows("make checkpoint", {"recipe": recipe}, make_checkpoint(recipe, checkpoint), machine)
    for dtype in dtypes:
        case = {"recipe": recipe, "dtype": dtype, "flags": list(flags)}
        said(f"exporting {recipe} as {dtype}")
        try:
            stage = export(checkpoint, folder / f"{recipe}-{dtype}", dtype, *flags)
        except ModelError as error:
            row = Row(side=OURS, workload="export", case=case, status="FAILED", reason=error.found)
            rows.append(row)
            continue
        rows += _rows("export", case, stage, machine)
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    return Document(
        benchmark="export",
        model={"name": recipe, "checkpoint_bytes": size},
        settings={"recipe": recipe, "dtypes": list(dtypes), "flags": list(flags)},
        rows=tuple(rows),
        machine=machine,
    )


def _rows(workload: str, case: Mapping[str, Any], stage: Stage, machine: Mapping[str, Any]) -> list[Row]:
    stamp = {**machine, **clocks()}
    figures = {**stage.told, "cpu_seconds": stage.cpu_seconds}
    return [
        Row(
            side=OURS, workload=workload, case=case, rounds=((stage.seconds,),), figures=figures, stamp=stamp
        ),
        Row(
            side=OURS,
            workload=f"{workload} peak memory",
            case=case,
            unit="B",
            rounds=((float(stage.peak_rss),),),
            stamp=stamp,
        ),
    ]


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
