"""`latentrt bench`: how fast, how much memory, against what, how far from the limit, is it still right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option, Typer

from .bench_options import (
    AsJson,
    Backend,
    Batch,
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
    finish,
    listed,
    pace_of,
    peers_of,
    saying,
    task_of,
)

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
    budget: Annotated[float, Option(help="Seconds for all sides of one workload.")] = 60.0,
    quick: Quick = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Time every stage and the whole picture, in turns with peers and with a second run of ours."""
    from ..benchmarks.case import WORKLOADS, Case
    from ..benchmarks.sides.contract import REFERENCES
    from ..benchmarks.verbs.latency import Sides, measure_latency

    opened = find(model, checkpoint)
    case = Case.of(
        opened.package.manifest,
        width=width,
        height=height,
        steps=steps,
        pictures=batch,
        guidance_scale=guidance_scale,
        sampler=sampler,
    )
    sides = Sides(
        task=task_of(opened, backend, threads, device),
        peers=peers_of(peers),
        references=listed(references, REFERENCES),
    )
    with saying(as_json=as_json) as said:
        document = measure_latency(
            opened.package,
            sides,
            [case],
            workloads=listed(workloads, WORKLOADS) or WORKLOADS,
            pace=pace_of(budget, quick=quick),
            said=said,
        )
    finish(document, opened, out, as_json=as_json)


@bench.command()
def scaling(
    model: ModelName = "demo",
    backend: Backend = "auto",
    axes: Annotated[str, Option(help="With commas: steps, batch, pixels. Default: all.")] = "",
    width: Width = None,
    height: Height = None,
    threads: Threads = None,
    budget: Annotated[float, Option(help="Seconds for one axis.")] = 60.0,
    quick: Quick = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Cost against steps, batch and pixels, with the line through the points and what is left of it."""
    from ..benchmarks.case import Case
    from ..benchmarks.verbs.scaling import AXES, measure_scaling

    opened = find(model)
    case = Case.of(opened.package.manifest, width=width, height=height)
    chosen = listed(axes, AXES) or tuple(AXES)
    with saying(as_json=as_json) as said:
        document = measure_scaling(
            opened.package,
            task_of(opened, backend, threads),
            case,
            axes={name: AXES[name].values for name in chosen},
            pace=pace_of(budget, quick=quick),
            said=said,
        )
    finish(document, opened, out, as_json=as_json)


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
    from ..benchmarks.verbs.latency import Sides
    from ..benchmarks.verbs.memory import measure_memory

    opened = find(model, checkpoint)
    case = Case.of(opened.package.manifest, width=width, height=height, steps=steps, pictures=batch)
    sides = Sides(task=task_of(opened, backend, threads, device), peers=peers_of(peers), references=())
    with saying(as_json=as_json) as said:
        document = measure_memory(opened.package, sides, case, said=said)
    finish(document, opened, out, as_json=as_json)


@bench.command()
def throughput(
    model: ModelName = "demo",
    backend: Backend = "auto",
    batches: Annotated[str, Option(help="Pictures per call, with commas.")] = "1,2,4,8",
    rate: Annotated[
        float | None, Option(min=1e-6, help="Server: queries per second, besides the search.")
    ] = None,
    deadline: Annotated[
        float | None,
        Option(min=1e-6, help="Server: seconds for 99 % of queries. Default: 4 times one query's median."),
    ] = None,
    together: Annotated[
        int, Option(min=1, help="Server: so many waiting queries are drawn in one call.")
    ] = 1,
    width: Width = None,
    height: Height = None,
    steps: Steps = 20,
    threads: Threads = None,
    budget: Annotated[
        float, Option(min=1.0, help="Seconds for each scenario, and for the search of Server's highest rate.")
    ] = 240.0,
    quick: Quick = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Pictures per second by batch, and MLPerf's scenarios: SingleStream, Offline, Server."""
    from dataclasses import replace

    from ..benchmarks.case import Case
    from ..benchmarks.verbs.throughput import Rules, measure_throughput

    opened = find(model)
    case = Case.of(opened.package.manifest, width=width, height=height, steps=steps)
    rules = Rules.quick() if quick else Rules(budget=budget)
    with saying(as_json=as_json) as said:
        document = measure_throughput(
            opened.package,
            task_of(opened, backend, threads),
            case,
            batches=counts(batches),
            rules=replace(rules, rate=rate, deadline=deadline, together=together),
            pace=pace_of(60.0, quick=quick),
            said=said,
        )
    finish(document, opened, out, as_json=as_json)


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

    opened = find(model)
    with saying(as_json=as_json) as said:
        document = measure_cold_start(
            opened.package,
            task_of(opened, backend, threads),
            repeats=QUICK_REPEATS if quick else repeats,
            said=said,
        )
    finish(document, opened, out, as_json=as_json)


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

    opened = find(model)
    multiple = opened.package.manifest.size_multiple
    profiles = tuple(Profile.parse(text, multiple=multiple) for text in profile or ())
    chosen = listed(nets, built_nets(opened.package))
    with saying(as_json=as_json) as said:
        builds = Builds(backend=backend, profiles=profiles, nets=chosen, repeats=repeats)
        document = measure_build(opened.package, builds, said=said)
    finish(document, opened, out, as_json=as_json)


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

    opened = find(model, checkpoint)
    case = Case.of(opened.package.manifest, width=width, height=height, steps=steps)
    inputs = Inputs(cases=(case,), samples=1 if quick else samples)
    task = task_of(opened, backend, threads)
    chosen = Reference.of(task, reference)
    with saying(as_json=as_json) as said:
        document = measure_parity(opened.package, task, inputs, reference=chosen, said=said)
    finish(document, opened, out, as_json=as_json)


@bench.command()
def compare(
    before: Annotated[Path, Argument(help="A document of `latentrt bench`.")],
    after: Annotated[Path, Argument(help="Another of the same verb and model.")],
    threshold: Annotated[float, Option(help="The smallest change that counts: 0.05 is 5 %.")] = 0.05,
    as_json: AsJson = False,
) -> None:
    """Ratios of two documents with their intervals. Exit code 1: ours is slower, beyond the noise."""
    from ..benchmarks.records import read_document
    from ..benchmarks.verbs.compare import compare as compare_documents

    found = compare_documents(read_document(before), read_document(after), threshold=threshold)
    print(json.dumps(found.to_json()) if as_json else found.format())
    if found.regressed:
        raise Exit(1)


@bench.command()
def report(
    results: Annotated[Path, Argument(help="A folder of documents.")] = Path("benchmarks/results"),
    readme: Annotated[
        Path | None, Option(help="Its text between the markers bench:begin and bench:end is replaced.")
    ] = None,
    figures: Annotated[
        Path | None, Option(help="Folder for the PNGs. Default: `figures` beside the documents.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw every figure and table again, from the JSON documents alone. Needs the extra [bench]."""
    from ..benchmarks.report.publish import write_report

    found = write_report(results, readme, figures or results / "figures")
    if as_json:
        told = {"documents": found.documents, "figures": found.figures, "changed": found.changed}
        print(json.dumps({**told, "remarks": found.remarks}, default=str))
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
    from ..benchmarks.verbs.latency import Sides
    from ..benchmarks.verbs.suite import measure_all

    opened = find(model, checkpoint)
    sides = Sides(task=task_of(opened, backend, threads, device), peers=peers_of(peers))
    failed = False
    with saying(as_json=False) as said:
        for path, document in measure_all(opened, sides, folder, quick=quick, said=said):
            print(f"{path}: {len(document.rows)} rows{', of which some FAILED' if document.failed else ''}")
            failed = failed or document.failed
    if failed:
        raise Exit(1)
