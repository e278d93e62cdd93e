"""All that only a GPU can show, in under ten minutes: `python -m latentrt.benchmarks.gpu.check`.

    --package demo                                      the shipped model, or a package folder
    --backends onnxruntime-cuda tensorrt tensorrt-rtx   which; all of them by default
    --out FILE                                          default: gpu_check-<date>.json

Prints a line per row. The exit code is 0 only if nothing FAILED, 1 if something did, and 4 where there is
no GPU. Backends that cannot run here are "not available", with the reason: that is no failure. Every section
runs in a process of its own with a time limit. Other processes on the GPU disturb the sections `memory` and
`ladder`, and the last takes all of the GPU's memory for a moment.

The document is one as every verb writes (docs/benchmarks.md). A row's workload is the section, its case has
`backend` and `what` was looked at. The row `process` of each section has the seconds of its process, with its
start. Figures by section:

    available   is: name, version, device
    build       of each net, as in `latentrt bench build`
    placement   `every net` opens: device, weights_mib; "not available" where the library does not list this
                GPU and refuses it. ONNX Runtime besides, of each net: nodes that ran, and on_cpu those that
                ran there; no floating-point node and no copy may be one
    parity      of each net, as in `latentrt bench parity` against ONNX Runtime on the CPU
    picture     the same of whole pictures
    graphs      psnr_db (bar 50) between plain and replayed loops; "not available" with the reason where the
                loop cannot be captured
    memory      opened_mib, peak_mib, closed_mib since the baseline, of all processes on the GPU: at most 64
                may be missing once closed, and 16 more after the last cycle than after the first; what the
                first cycle leaves is the libraries', and not judged; and the ledger of the nets
    host_memory resident_mib, and by how much it has grown over so many pictures of plain loops (at most 8)
    ladder      need_mib; then, with less and less free_mib: drawn, rungs, psnr_db, or how it was refused
    timing      a picture by ours, and by a plain loop over the same library where there is one, in turns, as
                in `latentrt bench latency`: stages_p50_s, …; no time is too long
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from ...engines.backend import choose_backend
from ...engines.cuda.facts import available
from ...engines.errors import BackendError, LatentrtError
from ...engines.package import Package
from ...runtime.pipeline import SHIPPED
from ..machine import clocks
from ..process import Child, SideError, become_child
from ..records import Document, Row, short
from ..verbs.latency import describe_model
from .memory import host_memory, ladder, memory
from .opener import Opener, Scale, backend_opener, collect, row_of
from .sections import build, graphs, parity, picture, placement, timing

BACKENDS = ("onnxruntime-cuda", "tensorrt", "tensorrt-rtx")
LIMIT = 570.0  # seconds of the whole run

RunInChild = Callable[[Opener, Scale], Iterator[Row]]
RunSection = Callable[[str, str, float], Iterator[Row]]  # backend, section, seconds it may take


def describe(opener: Opener, scale: Scale) -> Iterator[Row]:
    """What the backend says it is. (Where it cannot run there is no opener, and `run_in_child` says why.)"""
    del scale
    _, engine = choose_backend(opener.task.backend)
    yield row_of("backend", {"is": engine.describe()})


# What is run, in this order, and for how many seconds at most. Where one that is needed fails, the rest has
# nothing to run on.
SECTIONS: Mapping[str, tuple[RunInChild, float]] = {
    "available": (describe, 60),
    "build": (build, 300),
    "placement": (placement, 90),
    "parity": (parity, 90),
    "picture": (picture, 120),
    "graphs": (graphs, 90),
    "memory": (memory, 90),
    "host_memory": (host_memory, 120),
    "ladder": (ladder, 120),
    "timing": (timing, 120),
}
NEEDED = ("available", "build", "placement")


def run_in_child(section: str, backend: str, root: Path) -> None:
    """What the child of a section does: each row is a line of JSON on stdout, as soon as it is known."""
    reply, package = become_child(), Package.open(root)
    try:
        opener = backend_opener(backend, package)
    except BackendError as error:
        reply(row_of("backend", missing=error.found).to_json())
        return
    run, _ = SECTIONS[section]
    for row in collect(run(opener, Scale.of(package.manifest))):
        reply(row.to_json())


def check(
    backends: Sequence[str], run: RunSection, *, limit: float = LIMIT, said: Callable[[str], None] = print
) -> Iterator[list[Row]]:
    """All sections of all backends, one after the other; after each, every row so far, in the same list.

    A section that finds none of the `limit` in seconds left is a failed row. `said` gets a line for each row.
    """
    rows: list[Row] = []
    began = perf_counter()
    for backend in backends:
        for section, (_, most) in SECTIONS.items():
            left, first = limit - (perf_counter() - began), len(rows)
            late = row_of("process", problems=[f"no time is left of {limit:.0f} s"])
            for row in run(backend, section, min(most, left)) if left > 0 else [late]:
                case = {**row.case, "backend": backend, "what": row.workload}
                rows.append(replace(row, workload=section, case=case, stamp=row.stamp or clocks()))
                said(line_of(rows[-1]))
            yield rows
            found = [row.status for row in rows[first:]]
            # What was not built need not have been; of the other sections the first row says it.
            if section in NEEDED and ("FAILED" in found if section == "build" else found[0] != "ok"):
                break


def run_section(
    arguments: Sequence[str], limit: float, environment: Mapping[str, str] | None = None
) -> Iterator[Row]:
    """The rows that `python ARGUMENTS` writes, as it writes them; then one of the process.

    That one is FAILED if the process crashed, did not end within `limit` seconds, or wrote no row.
    """
    began, count, problem = perf_counter(), 0, ""
    with Child(*arguments, environment=environment) as child:
        try:
            for line in child.lines(limit):
                with suppress(ValueError, KeyError, TypeError):  # a line that a crash cut short
                    yield Row.from_json(json.loads(line))
                    count += 1
        except SideError as error:
            problem = error.reason
    problem = problem or ("" if count else "it ended without a row")
    yield row_of("process", problems=[problem] if problem else (), samples=[perf_counter() - began])


def line_of(row: Row) -> str:
    """A row for people, on one line."""
    reason = f": {short(row.reason)}" if row.reason else ""
    figures = {**({"seconds": row.summary["p50"]} if row.samples else {}), **row.figures}
    shown = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in figures.items()
        if isinstance(value, (int, float, str)) and len(str(value)) < 60
    ]
    what = f"{row.case['backend']:<16} {row.workload:<11} {row.case['what']}"
    return "  ".join([f"{what}: {row.status}{reason}", *shown])


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, print, write; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--package", default="demo")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of the whole run")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)  # in the child
    options = parser.parse_args(arguments)
    if options.section:
        run_in_child(options.section, options.backends[0], Path(options.package))
        return 0
    if reason := available():
        print(f"gpu_check: {reason}. Run it where an NVIDIA GPU and its driver are.", file=sys.stderr)
        return BackendError.exit_code
    try:
        package = Package.open(SHIPPED.get(options.package, Path(options.package)))
    except LatentrtError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return error.exit_code
    profile = Scale.of(package.manifest).profile
    settings = {"backends": options.backends, "profile": profile, "limit": options.limit}
    document = Document(benchmark="gpu_check", model=describe_model(package), settings=settings, rows=())
    out: Path = options.out or Path(f"gpu_check-{document.date[:10]}.json")
    with tempfile.TemporaryDirectory() as store:

        def run(backend: str, section: str, limit: float) -> Iterator[Row]:
            command = ["-X", "faulthandler", "-m", f"{__package__}.check", "--section", section]
            command += ["--backends", backend, "--package", str(package.root)]
            return run_section(command, limit, {"LATENTRT_CACHE": store})

        for rows in check(options.backends, run, limit=options.limit):
            # after each section: whatever ends this process, the rest is written
            document = replace(document, rows=tuple(rows))
            document.write(out)
    count = Counter(row.status for row in document.rows)
    failures = f"{count['FAILED']} FAILED" if document.failed else "nothing failed"
    print(f"{failures}, {count['ok']} ok, {count['not available']} not available: {out}")
    return 1 if document.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
