"""`latentrt bench`: how fast, how much memory, against what, how far from the limit, is it still right."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Exit, Option, Typer

from .bench_options import (
    AsJson,
    Backend,
    Batch,
    Budget,
    Checkpoint,
    Device,
    Guidance,
    Height,
    ModelName,
    Out,
    Peers,
    Quick,
    Sampler,
    Steps,
    Threads,
    Width,
    counts,
    find,
    listed,
    measured,
    pace_of,
    progress_lines,
    sides_of,
    task_of,
)

if TYPE_CHECKING:
    from ..benchmarks.records import Document
    from ..benchmarks.verbs.latency import Progress

bench = Typer(
    help="Measure latency, memory and accuracy, beside other runtimes; every result is a JSON document.",
    epilog="Method, fields and how to read the figures: docs/benchmarks.md. Exit code 1: a row failed.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@bench.command()
def latency(
    model: ModelName = "demo",
    checkpoint: Checkpoint = None,
    backend: Backend = "auto",
    device: Device = "auto",
    peers: Peers = "",
    workloads: Annotated[
        str, Option(help="With commas: text_encoder, invariants, unet, update, vae_decoder, picture.")
    ] = "",
    references: Annotated[
        str,
        Option(
            help='With commas: "latentrt again", yardstick, ceiling. The first takes as much memory as ours.'
        ),
    ] = "latentrt again,yardstick,ceiling",
    width: Width = None,
    height: Height = None,
    steps: Steps = 20,
    batch: Batch = 1,
    guidance_scale: Guidance = None,
    sampler: Sampler = "dpmpp_2m",
    threads: Threads = None,
    budget: Budget = 60.0,
    quick: Quick = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Time every stage and the whole picture, in turns with peers and with a second run of ours."""
    from ..benchmarks.case import WORKLOADS, Case
    from ..benchmarks.sides.contract import REFERENCES
    from ..benchmarks.verbs.latency import measure_latency

    found = find(model, checkpoint)
    sides = sides_of(task_of(found, backend, threads, device), peers, listed(references, REFERENCES))
    case = Case.of(
        found.package.manifest,
        width=width,
        height=height,
        steps=steps,
        pictures=batch,
        guidance_scale=guidance_scale,
        sampler=sampler,
    )
    chosen = listed(workloads, WORKLOADS) or WORKLOADS
    pace = pace_of(budget, quick=quick)
    measure = partial(measure_latency, found.package, sides, [case], workloads=chosen, pace=pace)
    measured(found, out, measure, as_json=as_json)


@bench.command()
def scaling(
    model: ModelName = "demo",
    backend: Backend = "auto",
    axes: Annotated[str, Option(help="With commas: steps, batch, pixels. Default: all.")] = "",
    width: Width = None,
    height: Height = None,
    threads: Threads = None,
    budget: Budget = 60.0,
    quick: Quick = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Cost against steps, batch and pixels, with the line through the points and what is left of it."""
    from ..benchmarks.case import Case
    from ..benchmarks.verbs.scaling import AXES, measure_scaling

    found = find(model)
    task = task_of(found, backend, threads)
    case = Case.of(found.package.manifest, width=width, height=height)
    chosen = {name: AXES[name].values for name in listed(axes, AXES) or AXES}
    pace = pace_of(budget, quick=quick)
    measure = partial(measure_scaling, found.package, task, case, axes=chosen, pace=pace)
    measured(found, out, measure, as_json=as_json)


@bench.command()
def memory(
    model: ModelName = "demo",
    checkpoint: Checkpoint = None,
    backend: Backend = "auto",
    device: Device = "auto",
    peers: Peers = "",
    width: Width = None,
    height: Height = None,
    steps: Steps = 20,
    batch: Batch = 1,
    threads: Threads = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Peak memory beside peers, the ledger of every net, and memory over one request."""
    from ..benchmarks.case import Case
    from ..benchmarks.verbs.memory import measure_memory

    found = find(model, checkpoint)
    sides = sides_of(task_of(found, backend, threads, device), peers, ())
    case = Case.of(found.package.manifest, width=width, height=height, steps=steps, pictures=batch)
    measure = partial(measure_memory, found.package, sides, case)
    measured(found, out, measure, as_json=as_json)


@bench.command()
def throughput(
    model: ModelName = "demo",
    backend: Backend = "auto",
    batches: Annotated[str, Option(help="Pictures per call, with commas.")] = "1,2,4,8",
    width: Width = None,
    height: Height = None,
    steps: Steps = 20,
    threads: Threads = None,
    budget: Annotated[float, Option(min=1.0, help="Seconds for each scenario.")] = 240.0,
    quick: Quick = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Pictures per second by batch, and MLPerf's scenarios SingleStream and Offline."""
    from ..benchmarks.case import Case
    from ..benchmarks.verbs.throughput import Rules, measure_throughput

    found = find(model)
    task = task_of(found, backend, threads)
    case = Case.of(found.package.manifest, width=width, height=height, steps=steps)
    sizes = counts(batches)
    rules = Rules.quick() if quick else Rules(budget=budget)
    pace = pace_of(60.0, quick=quick)
    measure = partial(measure_throughput, found.package, task, case, batches=sizes, rules=rules, pace=pace)
    measured(found, out, measure, as_json=as_json)


@bench.command("cold-start")
def cold_start(
    model: ModelName = "demo",
    backend: Backend = "auto",
    repeats: Annotated[int, Option(min=1, help="Fresh processes of each kind.")] = 7,
    threads: Threads = None,
    quick: Quick = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Fresh processes: import, open, first and second picture, each by itself."""
    from ..benchmarks.verbs.cold_start import QUICK_REPEATS, measure_cold_start

    found = find(model)
    task = task_of(found, backend, threads)
    times = QUICK_REPEATS if quick else repeats

    def measure(progress: Progress) -> Document:
        return measure_cold_start(found.package, task, repeats=times, said=progress)

    measured(found, out, measure, as_json=as_json)


@bench.command()
def build(
    model: ModelName = "demo",
    backend: Annotated[
        str,
        Option(
            help="tensorrt-rtx, which needs no GPU; tensorrt; onnxruntime, onnxruntime-cuda: their layouts."
        ),
    ] = "tensorrt-rtx",
    profile: Annotated[
        list[str] | None, Option(help="As for `latentrt build`. Default: the model's size, :b1-4.")
    ] = None,
    nets: Annotated[str, Option(help="Only these, with commas. Default: all that get engines.")] = "",
    repeats: Annotated[int, Option(min=1, help="Rounds, each into an empty store.")] = 1,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Time and memory that building every engine takes, and the engines' size."""
    from ..benchmarks.verbs.build import Builds, measure_build
    from ..engines.profiles import Profile
    from ..engines.tensorrt.build import built_nets

    found = find(model)
    multiple = found.package.manifest.size_multiple
    builds = Builds(
        backend=backend,
        profiles=tuple(Profile.parse(text, multiple=multiple) for text in profile or ()),
        nets=listed(nets, built_nets(found.package)),
        repeats=repeats,
    )

    def measure(progress: Progress) -> Document:
        return measure_build(found.package, builds, said=progress)

    measured(found, out, measure, as_json=as_json)


@bench.command()
def gpu(
    package: Annotated[str, Option(help="The shipped model, demo, or a package folder.")] = "demo",
    out: Out = None,
) -> None:
    """All that only a GPU can show, in under ten minutes. Exit code 4: there is none."""
    from ..benchmarks.gpu.check import main

    raise Exit(main(["--package", package, *(["--out", str(out)] if out else [])]))


@bench.command()
def parity(
    model: ModelName = "demo",
    checkpoint: Checkpoint = None,
    backend: Backend = "auto",
    reference: Annotated[
        str,
        Option(
            help="latentrt on ONNX Runtime's CPU, diffusers, onnxruntime, openvino, …."
            " Default: diffusers, or without it or a checkpoint onnxruntime."
        ),
    ] = "",
    samples: Annotated[int, Option(min=1, help="Seeds and prompts of every row.")] = 3,
    width: Width = None,
    height: Height = None,
    steps: Steps = 8,
    threads: Threads = None,
    quick: Quick = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Every net and whole pictures against a reference on the CPU, by a bar for each dtype."""
    from ..benchmarks.case import Case
    from ..benchmarks.verbs.parity import Inputs, Reference, measure_parity

    found = find(model, checkpoint)
    case = Case.of(found.package.manifest, width=width, height=height, steps=steps)
    inputs = Inputs(cases=(case,), samples=1 if quick else samples)
    task = task_of(found, backend, threads)
    chosen = Reference.of(task, reference)
    measure = partial(measure_parity, found.package, task, inputs, reference=chosen)
    measured(found, out, measure, as_json=as_json)


@bench.command()
def compare(
    before: Annotated[Path, Argument(help="A document of `latentrt bench`.")],
    after: Annotated[Path, Argument(help="Another of the same verb, model and machine.")],
    threshold: Annotated[float, Option(help="The smallest change that counts: 0.05 is 5 %.")] = 0.05,
    as_json: AsJson = False,
) -> None:
    """Ratios of two documents with their intervals. Exit code 1: ours is slower, or nothing was compared."""
    from ..benchmarks.records import read_document
    from ..benchmarks.verbs.compare import compare as compare_documents

    found = compare_documents(read_document(before), read_document(after), threshold=threshold)
    print(json.dumps(found.to_json()) if as_json else found.format())
    if found.regressed or not found.compared:
        raise Exit(1)


@bench.command()
def report(
    results: Annotated[Path, Argument(help="A folder of documents.")] = Path("benchmarks/results"),
    readme: Annotated[
        Path | None, Option(help="Gets the short table between bench-summary:begin and bench-summary:end.")
    ] = None,
    measurements: Annotated[
        Path | None, Option(help="Gets all tables and figures between bench:begin and bench:end.")
    ] = None,
    figures: Annotated[
        Path | None, Option(help="Folder for the PNGs. Default: `figures` beside the documents.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw every figure and table again, from the JSON documents alone. Needs the extra [bench]."""
    from ..benchmarks.report.publish import Pages, write_report

    pages = Pages(readme=readme, measurements=measurements, figures=figures or results / "figures")
    found = write_report(results, pages)
    if as_json:
        print(json.dumps(vars(found), default=str))
        return
    print(f"{found.documents} documents, {len(found.figures)} figures, {len(found.changed)} files changed")
    print("\n".join([*(f"  {path}" for path in found.changed), *found.remarks]))


@bench.command("all")
def everything(
    folder: Annotated[Path, Argument(help="Where the documents go, VERB-MODEL.json each.")],
    model: Annotated[str, Option(help="As for the other verbs.")] = "demo",
    checkpoint: Checkpoint = None,
    backend: Backend = "auto",
    device: Device = "auto",
    peers: Peers = "",
    threads: Threads = None,
    quick: Quick = False,
) -> None:
    """Every verb that measures, one after the other; --quick ends within two minutes for the demo model."""
    from ..benchmarks.sides.contract import REFERENCES
    from ..benchmarks.verbs.suite import measure_all

    found = find(model, checkpoint)
    sides = sides_of(task_of(found, backend, threads, device), peers, REFERENCES)
    failed = False
    with progress_lines(enabled=True) as progress:
        for path, document in measure_all(found, sides, folder, quick=quick, progress=progress):
            print(f"{path}: {len(document.rows)} rows{', of which some FAILED' if document.failed else ''}")
            failed = failed or document.failed
    if failed:
        raise Exit(1)
