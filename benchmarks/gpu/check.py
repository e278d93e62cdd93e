"""All that only a GPU can show, in under ten minutes: `python -m latentrt.benchmarks.gpu.check`.

    --package demo                                      the shipped model, or a package folder
    --backends onnxruntime-cuda tensorrt tensorrt-rtx   which; all of them by default
    --out FILE                                          default: results/gpu_check-<gpu>-<date>.json

Prints a line per row. The exit code is 0 only if nothing FAILED, 1 if something did, and 4 where there is
no GPU. Backends that cannot run here are "not available", with the reason: that is no failure. Every section
runs in a process of its own with a time limit (`gpu_child.py`); other processes on the GPU disturb the
sections `memory` and `ladder`, and the last takes all of the GPU's memory for a moment.

The document::

    benchmark   "gpu_check"
    schema      1
    date        of the run, UTC, "2026-11-21"
    machine     as every benchmark's (machine.py); `gpu` has name, compute_capability, driver, cuda, total_mib
    package     name and dtype
    profile     what engines were built for
    seconds     of the whole run
    summary     {"ok": …, "FAILED": …, "not available": …} rows
    sections    [{backend, section, seconds}]    of each process, with its start
    rows        [{backend, section, what, status, reason, figures}]

`status` is "ok", "FAILED" or "not available", and `reason` is "" where it is ok. `figures` by section:

    available   is: name, version, device
    build       seconds, engine_mb, peak_rss_gb, profiles, layers, … of each net (`build_time.py`);
                onnxruntime-cuda: layout, milliseconds and relative_l2 of each layout, rejected ones
    open        device, weights_mib
    placement   nodes that ran, and on_cpu those that ran there; no floating-point node and no copy may be one
    parity      relative_l2 (bar 1e-3 for fp32, 5e-3 for fp16), max_error, psnr_db, of the worst output of a
                net at one shape, against ONNX Runtime on the CPU; uint8 is judged by psnr_db (bar 40)
    picture     psnr_db (bar 40) of the worst of three pictures, identical, seconds, cpu_seconds
    graphs      psnr_db (bar 50) between plain and replayed loops, identical, plain_p50_s, graph_p50_s,
                launches; "not available" with the reason where the loop cannot be captured
    memory      opened_mib, peak_mib, closed_mib since the baseline, of all processes, as `measured_by` tells:
                at most 64 may be missing once closed, and 16 more after the last cycle than after the first;
                kept_by_libraries_mib after the first cycle, which is not judged; and the ledger of the nets
    host_memory resident_mib, and by how much it has grown over so many pictures of plain loops (at most 8)
    ladder      need_mib; then, with less and less free_mib: drawn, rungs, psnr_db, or what was refused
    timing      p50_s and p90_s of a guided picture of `steps` steps, stages_p50_s; nothing is judged

"inf" and "-inf" are text. The peak is that of samples taken every 2 ms.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

from ...engines.cuda.facts import available
from ...engines.errors import BackendError, LatentrtError
from ...engines.package import Package
from ...runtime.pipeline import SHIPPED
from ..machine import describe_machine
from .child import NEEDED, SECTIONS, run_child, section_command
from .opener import Scale
from .rows import Row

BACKENDS = ("onnxruntime-cuda", "tensorrt", "tensorrt-rtx")
SCHEMA = 1
LIMIT = 570.0  # seconds of the whole run

RunSection = Callable[[str, str, float], list[Row]]  # backend, section, seconds it may take


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a run has so far; `sections` and `rows` are as in the document."""

    sections: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def count(self, status: str) -> int:
        """Rows of that status."""
        return sum(row["status"] == status for row in self.rows)


def check(
    backends: Sequence[str], run: RunSection, *, limit: float = LIMIT, said: Callable[[str], None] = print
) -> Iterator[Found]:
    """All sections of all backends, one after the other; the same `Found` after each, with one more.

    Args:
        backends: their names.
        run: runs a section.
        limit: seconds for all of it; what finds none left is a failed row.
        said: is told a line per row.
    """
    found, began = Found(), perf_counter()
    for backend in backends:
        for section, settings in SECTIONS.items():
            left, started = limit - (perf_counter() - began), perf_counter()
            rows = run(backend, section, min(settings.limit, left)) if left > 0 else [_late(limit)]
            took = round(perf_counter() - started, 2)
            found.sections.append({"backend": backend, "section": section, "seconds": took})
            for row in rows:
                found.rows.append({"backend": backend, "section": section, **row.to_json()})
                said(f"{backend:<16} {section:<9} {row.format()}")
            yield found
            if section in NEEDED and not _can_go_on(section, rows):
                break


def _late(limit: float) -> Row:
    return Row(what="process", status="FAILED", reason=f"no time is left of {limit:.0f} s")


def _can_go_on(section: str, rows: Sequence[Row]) -> bool:
    """Whether later sections have anything to run on. What was not built need not have been."""
    if section == "build":
        return not any(row.status == "FAILED" for row in rows)
    return all(row.status == "ok" for row in rows)


def document(found: Found, package: Package, date: str, seconds: float) -> dict[str, Any]:
    """What is written; see the module's docstring."""
    manifest = package.manifest
    return {
        "benchmark": "gpu_check",
        "schema": SCHEMA,
        "date": date,
        "machine": describe_machine(),
        "package": {"name": manifest.name, "dtype": manifest.dtype},
        "profile": Scale.of(manifest).profile,
        "seconds": round(seconds, 1),
        "summary": {status: found.count(status) for status in ("ok", "FAILED", "not available")},
        "sections": found.sections,
        "rows": found.rows,
    }


def default_file(gpu: str, date: str) -> Path:
    """Beside the other results in a checkout, else in the current folder."""
    results = Path(__file__).resolve().parents[1] / "results"
    name = f"gpu_check-{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}-{date}.json"
    return (results if results.is_dir() else Path()) / name


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--package", default="demo")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of the whole run")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, print, write; the exit code."""
    given = _arguments(arguments)
    if reason := available():
        print(f"gpu_check: {reason}. Run it where an NVIDIA GPU and its driver are.", file=sys.stderr)
        return BackendError.exit_code
    try:
        package = Package.open(SHIPPED.get(given.package, Path(given.package)))
    except LatentrtError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return error.exit_code
    began, date = perf_counter(), datetime.now(timezone.utc).strftime("%Y-%m-%d")
    out: Path = given.out or default_file(describe_machine()["gpu"]["name"], date)
    found = Found()
    with tempfile.TemporaryDirectory() as store:

        def run(backend: str, section: str, limit: float) -> list[Row]:
            command = section_command(backend, section, package.root)
            return run_child(command, limit, {"LATENTRT_CACHE": store})

        for found in check(given.backends, run, limit=given.limit):
            # after each section: whatever ends this process, the rest is written
            data = document(found, package, date, perf_counter() - began)
            out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    failures = found.count("FAILED")
    told = "nothing failed" if not failures else f"{failures} FAILED"
    print(f"{told}, {found.count('ok')} ok, {found.count('not available')} not available: {out}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
