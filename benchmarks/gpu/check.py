"""What only a GPU can show, in the order of what it is worth: `python -m latentrt.benchmarks.gpu.check`.

    --minutes 12            for all of it; what is left decides how long a step may take
    --steps unet,whole      only these, in the order of the plan; --list prints all, with their limits
    --package demo          a small model, whose pictures can be checked: the shipped one, or a package folder
    --full-size PACKAGE     a large one; by default SD 1.5's skeleton is filled with random weights
    --backends onnxruntime-cuda     also tensorrt and tensorrt-rtx, which build engines first
    --out FILE              default: gpu_check-<date>.json, or -2, -3, …
    --table FILE            prints the table of such a document, and runs nothing

Each step is a process of its own with a limit and a log in the folder `<out>-logs`; whatever becomes of it,
the next one runs. A line is printed for each row, and the document is written again after each: it is whole
whenever this process is killed. The table at the end is Markdown.

The exit code is 0 only if nothing FAILED, 1 if something did, 4 where there is no GPU, and 6 if it was
stopped (Ctrl-C, SIGTERM), after the table of what was found. What cannot run
here is "not available", with the reason: that is no failure. Nothing else may use the GPU meanwhile.

The document is one as every verb writes (docs/benchmarks.md). A row's workload is the step, its case has
`backend` and `what` was looked at; `at_s` of its stamp is when it came, in seconds since the step's process
was started. The row `process` of each step has the seconds of its process. Figures by step:

    environment     the libraries load; is: name, version, device
    torch_eager     one call of SD 1.5's UNet by torch: first_s, second_s, third_s, the medians of warm calls
                    by the device's events (device_p50_s) and until the host is free (host_p50_s)
    torch_compiled  the same by torch.compile, mode reduce-overhead
    smoke           `step`, one convolution and the UNet of the small model run at all
    build           of each net, as in `latentrt bench build`
    picture         as in `latentrt bench parity` against ONNX Runtime on the CPU
    placement       `every net` opens: device, weights_mib. ONNX Runtime besides, of each net: nodes that ran,
                    and on_cpu those that ran there; no floating-point node and no copy may be one
    parity          of each net, as in `latentrt bench parity` against ONNX Runtime on the CPU
    graphs          psnr_db (bar 50) between plain and replayed loops; "not available" with the reason where
                    the loop cannot be captured
    sharing         psnr_db (bar 50) of pictures that share calls against pictures alone; how many are equal
    skeleton        mib that were written, with the seconds
    unet            of the large model, in the layout `nhwc`: opened; plain and replayed as a graph, with
                    figures as torch's, taken_mib and peak_mib of the device
    whole           a picture of 20 steps: opened, the first one, plain and replayed ones (psnr_db, bar 50);
                    memory: opened_mib, peak_mib, closed_mib, and of_process_mib if NVML tells
    decoder, text_encoder, unet_plain   as unet; unet_plain in the layout `plain`, relative_l2 to `nhwc`
    shapes          two shapes in turns: rebuilt_s is what the first run after a change takes longer
    exhaustive, eager_loading, weights_in_arena, cudnn_attention    as unet, with cudnn_conv_algo_search
                    EXHAUSTIVE; with CUDA_MODULE_LOADING EAGER; with weights in the arena; with the attention
                    that the library chooses
    decoder_workspace   as decoder, with cudnn_conv_use_max_workspace 0
    outlived        relative_l2 of two plain runs, of a replay, and of one after another shape ran: outlives
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from ...engines.cuda.facts import available
from ...engines.errors import BackendError, CancelledError, LatentrtError, StorageError, UsageError
from ...engines.package import Package
from ...runtime.model import SHIPPED
from ..machine import clocks
from ..process import Child, SideError, become_child
from ..records import Document, Row, read_document, short
from ..verbs.latency import describe_model
from .opener import collect, row_of
from .plan import BACKENDS, ORT, STEPS, Place, planned
from .summary import FULL_SIZE, summary

MINUTES = 12.0
RunStep = Callable[[str, str, float], Iterator[Row]]  # step, backend, seconds it may take


def run_in_child(step: str, place: Place) -> None:
    """What the child of a step does: each row is a line of JSON on stdout, as soon as it is known."""
    reply = become_child()
    for row in collect(STEPS[step].run(place)):
        reply(replace(row, stamp=row.stamp or clocks()).to_json())


def check(plan: Sequence[tuple[str, str]], run: RunStep, *, limit: float) -> Iterator[list[Row]]:
    """Run steps, one after the other, and print each row; after each, every row so far, in the same list.

    A step that finds none of the `limit` in seconds left is a failed row.
    """
    rows: list[Row] = []
    began = perf_counter()
    for step, backend in plan:
        started = perf_counter()
        left = limit - (started - began)
        late = row_of("process", problems=[f"no time is left of {limit:.0f} s"])
        for row in run(step, backend, min(STEPS[step].limit, left)) if left > 0 else [late]:
            case = {**row.case, "backend": backend, "what": row.workload}
            stamp = {**row.stamp, "at_s": round(perf_counter() - started, 3)}
            rows.append(replace(row, workload=step, case=case, stamp=stamp))
            print(line_of(rows[-1]), flush=True)  # a pipe would keep it, and lose it when this is killed
            yield rows


def run_step(
    arguments: Sequence[str],
    limit: float,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> Iterator[Row]:
    """The rows that `python ARGUMENTS` writes, as it writes them; then one of the process.

    That one is FAILED if the process crashed, did not end within `limit` seconds, or wrote no row, or
    something else than rows.
    """
    began, count, problems = perf_counter(), 0, list[str]()
    with Child(*arguments, environment=environment, log=log) as child:
        try:
            for line in child.lines(limit):
                try:
                    yield Row.from_json(json.loads(line))
                    count += 1
                except (ValueError, KeyError, TypeError):  # a crash cut it short
                    problems.append(f"it wrote a line that is no row: {line[:60]!r}")
        except SideError as error:
            problems.append(error.reason)
    problems += [] if problems or count else ["it ended without a row"]
    yield row_of("process", problems=problems, samples=[perf_counter() - began])


def line_of(row: Row) -> str:
    """A row for people, on one line."""
    reason = f": {short(row.reason)}" if row.reason else ""
    figures = {**({"seconds": row.summary["p50"]} if row.samples else {}), **row.figures}
    shown = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in figures.items()
        if isinstance(value, (int, float, str)) and len(str(value)) < 60
    ]
    what = f"{row.case['backend']:<16} {row.workload:<17} {row.case['what']}"
    return "  ".join([f"{what}: {row.status}{reason}", *shown])


def list_steps() -> str:
    """Every step, for people."""
    return "\n".join(
        f"{name:<18}{step.limit:4.0f} s  for {', '.join(step.backends)}" for name, step in STEPS.items()
    )


def _minutes(text: str) -> float:
    """A number of minutes. Raises ArgumentTypeError for none, ValueError for what is no number."""
    if not 0 < (minutes := float(text)) < 1e6:
        raise argparse.ArgumentTypeError("more than 0 minutes, as in --minutes 12")
    return minutes


def _steps(text: str) -> list[str]:
    """The names in a list with commas. Raises ArgumentTypeError for an unknown one."""
    names = text.split(",")
    if unknown := [name for name in names if name not in STEPS]:
        raise argparse.ArgumentTypeError(f"there is no step {unknown[0]!r}: --list prints all of them")
    return names


def _parse(arguments: Sequence[str] | None) -> Any:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--minutes", type=_minutes, default=MINUTES)
    parser.add_argument("--steps", type=_steps, default=[])
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--package", default="demo")
    parser.add_argument("--full-size", type=Path)
    parser.add_argument("--backends", nargs="+", default=[ORT], choices=BACKENDS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    for name in ("--child", "--folder"):  # in the child
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def child_arguments(step: str, place: Place) -> list[str]:
    """The command line of a step's process, behind `python`."""
    command = ["-X", "faulthandler", "-m", f"{__package__}.check", "--child", step]
    where = [
        "--package",
        str(place.package),
        "--full-size",
        str(place.full_size),
        "--folder",
        str(place.folder),
    ]
    return [*command, "--backends", place.backend, *where]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, print, write; the exit code."""
    options = _parse(arguments)
    if options.child:
        folder = Path(options.folder)
        place = Place(
            backend=options.backends[0],
            package=Path(options.package),
            full_size=options.full_size,
            folder=folder,
        )
        run_in_child(options.child, place)
        return 0
    if options.list:
        print(list_steps())
        return 0
    try:
        if options.table:
            print(summary(read_document(options.table)))
            return 0
        if reason := available():
            print(f"gpu_check: {reason}. Run it where an NVIDIA GPU and its driver are.", file=sys.stderr)
            return BackendError.exit_code
        package = Package.open(SHIPPED.get(options.package, Path(options.package)))
        document, stopped = _run(options, package)
    except LatentrtError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return error.exit_code
    print(f"\n{summary(document)}\n")
    return CancelledError.exit_code if stopped else 1 if document.failed else 0


def _run(options: Any, package: Package) -> tuple[Document, bool]:
    """Run the steps, and write the document whenever it has grown; whether somebody stopped it.

    Raises:
        UsageError: none of the steps is for any of the backends.
        PackageError: the large model is no package.
        StorageError: the document cannot be written where it should go.
    """
    plan = planned(options.backends, options.steps)
    if not plan:
        raise UsageError(
            f"no step of {', '.join(options.steps)} is for {', '.join(options.backends)}",
            expected="steps of these backends",
            fix="List them: python -m latentrt.benchmarks.gpu.check --list",
        )
    full_size = Package.open(options.full_size).manifest.name if options.full_size else FULL_SIZE
    settings = {name: getattr(options, name) for name in ("backends", "steps", "minutes")}
    settings["full_size"] = full_size
    document = Document(benchmark="gpu_check", model=describe_model(package), settings=settings, rows=())
    out, logs = _places(options.out, document)
    stopped = False
    with tempfile.TemporaryDirectory() as folder:
        large = options.full_size or Path(folder) / "sd15"
        place = Place(backend="", package=package.root, full_size=large, folder=Path(folder))

        def run(step: str, backend: str, limit: float) -> Iterator[Row]:
            command = child_arguments(step, replace(place, backend=backend))
            environment = {"LATENTRT_CACHE": str(Path(folder) / "store"), **STEPS[step].environment}
            return run_step(command, limit, environment, logs / f"{backend}-{step}.log")

        try:
            for rows in check(plan, run, limit=60 * options.minutes):
                document = replace(document, rows=tuple(rows))
                try:
                    document.write(out)
                except OSError as error:  # what is printed is still worth having
                    print(f"gpu_check: {out} is not up to date: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            stopped = True
            print("stopped: the table has what was found until now")
    count = Counter(row.status for row in document.rows)
    failures = f"{count['FAILED']} FAILED" if document.failed else "nothing failed"
    print(f"{failures}, {count['ok']} ok, {count['not available']} not available: {out}, logs in {logs}")
    return document, stopped


def _places(given: Path | None, document: Document) -> tuple[Path, Path]:
    """The file and the folder of logs, which are there now. Raises StorageError."""
    out = given or _unused(f"gpu_check-{document.date[:10]}")
    logs = out.with_name(f"{out.stem}-logs")
    try:
        logs.mkdir(parents=True, exist_ok=True)
        document.write(out)
    except OSError as error:
        raise StorageError(
            f"{out} cannot be written: {error.strerror}",
            expected="a folder that this user can write, with room",
            fix="Name another place: --out FILE",
        ) from error
    return out, logs


def _unused(name: str) -> Path:
    """A file that is not there yet: what was measured before stays."""
    names = (f"{name}{number}.json" for number in ("", *(f"-{count}" for count in range(2, 1000))))
    return next(path for path in map(Path, names) if not path.exists())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise SystemExit(main())
