"""Does a full-size model go through? `python -m latentrt.benchmarks.full_size FOLDER --out FILE`.

Makes an exact-shape random-weight checkpoint in FOLDER, exports it with `--verify`, opens the package and
takes guided steps at the model's own size. Every stage is a process of its own, so that each peak memory
is its own. Random weights give the right time and memory; the picture means nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

from .machine import describe_machine

_STEPS = """
import json, sys
from time import perf_counter
from latentrt.runtime import Pipeline
began = perf_counter()
with Pipeline.open(sys.argv[1]) as pipe:
    opened = perf_counter()
    times = [opened]
    for step in pipe.stream("a photo of a fox", num_inference_steps=int(sys.argv[2]), seed=1):
        times.append(perf_counter())
    latent = step.latent
    defaults = pipe.package.manifest.defaults
print(json.dumps({
    "open_s": opened - began,
    "first_step_with_prompt_s": times[1] - times[0],
    "guided_step_s": [b - a for a, b in zip(times[1:], times[2:])],
    "size": f"{defaults.width}x{defaults.height}",
    "latent_std": float(latent.std()),
}))
"""


def run_stage(name: str, arguments: list[str]) -> dict[str, Any]:
    """Run `python ARGUMENTS`; its wall seconds, its own peak memory and the last line it printed."""
    began = perf_counter()
    command = [sys.executable, *arguments]
    # resource's high-water mark covers all children so far, so each stage runs below a child of its own
    child = (
        "import json, resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "cpu = used.ru_utime + used.ru_stime\n"
        "print(json.dumps([done.returncode, used.ru_maxrss, cpu, done.stdout]))"
    )
    found = subprocess.run(  # noqa: S603
        [sys.executable, "-c", child, *command], stdout=subprocess.PIPE, text=True, check=True
    )
    code, peak_kib, cpu, output = json.loads(found.stdout)
    if code:
        raise SystemExit(f"{name} failed with exit code {code}")
    seconds = perf_counter() - began
    row = {"stage": name, "seconds": seconds, "cpu_seconds": cpu, "peak_rss_gb": peak_kib * 1024 / 1e9}
    print(f"{name:<24} {seconds:7.1f} s  (CPU {cpu:.1f} s)  peak {row['peak_rss_gb']:.2f} GB", flush=True)
    lines = str(output).strip().splitlines()
    if not lines or not lines[-1].startswith("{"):
        return row
    told = json.loads(lines[-1])
    told.pop("package", None)  # a path of this machine
    return {**row, "output": told}


def main() -> None:
    """Make, export with verification, and step; print a line per stage, write JSON with `--out`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", default="sd15")
    parser.add_argument("--dtypes", nargs="+", default=["fp16", "fp32"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    checkpoint = options.folder / options.recipe
    make = ["-m", "latentrt.benchmarks.checkpoints", options.recipe, str(checkpoint)]
    rows = [] if checkpoint.exists() else [run_stage("make checkpoint", make)]
    for dtype in options.dtypes:
        package = str(options.folder / f"{options.recipe}-{dtype}")
        verb = ["-m", "latentrt.cli", "export", str(checkpoint), "-o", package, "--dtype", dtype]
        rows.append(run_stage(f"export {dtype}, verified", [*verb, "--verify", "--overwrite", "--json"]))
        rows.append(run_stage(f"steps {dtype}", ["-c", _STEPS, package, str(options.steps)]))
    if options.out:
        document = {"benchmark": "full_size", "machine": describe_machine(), "rows": rows}
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
