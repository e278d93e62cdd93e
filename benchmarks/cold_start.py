"""How long a fresh process takes: `python -m latentrt.benchmarks.cold_start [--out FILE]`.

Every variant starts a new interpreter; the variants are interleaved, so that a slow minute of the
machine falls on all of them. Bars: the import < 400 ms, `--help` < 200 ms (medians of 7).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

from .machine import describe_machine

_BLOCK = "import sys; sys.modules.update(torch=None, diffusers=None, transformers=None); "
_PICTURE = (
    "from latentrt.runtime import Pipeline\n"
    "with Pipeline.open('demo') as pipe: pipe('a red circle on a blue background', seed=7)"
)
VARIANTS: dict[str, tuple[list[str], float | None]] = {  # name -> (arguments of python, bar in seconds)
    "bare interpreter": (["-c", "pass"], None),
    "import numpy": (["-c", "import numpy"], None),
    "import latentrt.runtime, torch blocked": (["-c", _BLOCK + "import latentrt.runtime"], 0.4),
    "latentrt --help": (["-m", "latentrt.cli", "--help"], 0.2),
    "first picture of the demo model": (["-c", _PICTURE], None),
}


def measure(repeats: int) -> dict[str, list[float]]:
    """Wall seconds of every variant, `repeats` times, interleaved, after one unmeasured round."""
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for round_number in range(repeats + 1):
        for name, (arguments, _) in VARIANTS.items():
            began = perf_counter()
            command = [sys.executable, *arguments]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
            if round_number:
                seconds[name].append(perf_counter() - began)
    return seconds


def main() -> None:
    """Print the medians beside their bars; write every figure as JSON with `--out`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, values in measure(arguments.repeats).items():
        median, bar = statistics.median(values), VARIANTS[name][1]
        rows.append({"variant": name, "median_s": median, "bar_s": bar, "seconds": values})
        verdict = "" if bar is None else f"  (bar {bar * 1000:.0f} ms: {'met' if median < bar else 'MISSED'})"
        print(f"{name:<42} {median * 1000:7.0f} ms{verdict}")
    if arguments.out:
        document = {"benchmark": "cold_start", "machine": describe_machine(), "rows": rows}
        arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
