"""`latentrt bench`: how fast, how much memory, against what, how far from the limit, is it still right."""

from __future__ import annotations

import inspect
import json
import shlex
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from typer import Argument, Exit, Option, Typer

from .progress import progress_bar

if TYPE_CHECKING:
    from ..benchmarks.case import Case
    from ..benchmarks.records import Document
    from ..benchmarks.rounds import Pace
    from ..benchmarks.sides.contract import Task
    from ..benchmarks.verbs.latency import Progress, Sides

bench = Typer(
    help="Measure latency, memory and accuracy, beside other runtimes; every result is a JSON document.",
    epilog="Method, fields and how to read the figures: docs/benchmarks.md. Exit code 1: a row failed.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
_Measure: TypeAlias = "Callable[..., Document]"  # with the keyword `progress`
_Device: TypeAlias = Literal["auto", "cpu", "cuda"]
_OUT = Annotated[Path | None, Option("--out", help="Write the JSON document here.")]
_MODEL = "`demo`, a package, a checkpoint (file or folder), or a model of random weights: sd15-fp32, …."
_JSON = Annotated[bool, Option("--json", help="Print the JSON document.")]


def _option(kind: Any, default: Any, text: str, *flags: str, least: int | None = None) -> tuple[Any, Any]:
    """What typer makes of an option, and its default."""
    return Annotated[kind, Option(*flags, help=text, min=least)], default


# The options that verbs share.
_SHARED: Mapping[str, tuple[Any, Any]] = {
    "model": (Annotated[str, Argument(help=_MODEL)], "demo"),
    "checkpoint": _option(Path | None, None, "For diffusers: the folder that a package was exported from."),
    "backend": _option(str, "auto", "latentrt's own: auto, onnxruntime, onnxruntime-cuda, tensorrt, …."),
    "device": _option(_Device, "auto", "Of peers that run on both. auto: where our own backend runs."),
    "peers": _option(str, "", "With commas: diffusers, diffusers-compile, onnxruntime, openvino, …."),
    "width": _option(int | None, None, "Pixels. Default: the model's."),
    "height": _option(int | None, None, "Pixels. Default: the model's."),
    "steps": _option(int, 20, "Number of inference steps.", least=1),
    "batch": _option(int, 1, "Pictures drawn at once.", least=1),
    "threads": _option(int | None, None, "Of every side on a CPU. Default: every processor.", least=1),
    "budget": _option(float, 60.0, "Seconds for all sides of one workload, or for one axis."),
    "quick": _option(bool, False, "Few runs: minutes become seconds, and intervals wide.", "--quick"),
    "out": (_OUT, None),
    "as_json": (_JSON, False),
}


class Call:
    """One call of a verb that measures: the model, and whatever else its options say.

    Raises:
        LatentrtError: as `benchmarks.models.open.find_model`.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        from ..benchmarks.models.open import find_model

        self.options = options
        said = partial(print, file=sys.stderr)
        self.model = find_model(
            options["model"],
            checkpoint=options.get("checkpoint"),
            backend=options.get("backend", "auto"),
            said=said,
        )
        self.package = self.model.package
        self.quick = bool(options.get("quick"))

    def task(self) -> Task:
        """What every side opens."""
        from ..benchmarks.sides.contract import Task
        from ..engines.processors import thread_count

        backend, threads = self.options["backend"], self.options["threads"]
        device = device_of(backend, self.options.get("device", "auto"))
        count = None if threads is None else thread_count(threads)
        return Task(
            model=self.model.path,
            checkpoint=self.model.checkpoint,
            backend=backend,
            threads=count,
            device=device,
            compile_mode=self.options.get("compile_mode", ""),
        )

    def sides(self, references: tuple[str, ...] = ()) -> Sides:
        """Ours, the peers that are named, and the references. Raises UsageError for an unknown peer."""
        from ..benchmarks.sides.contract import OF_ONE_VERB, OURS, REFERENCES, SIDES
        from ..benchmarks.verbs.latency import Sides

        known = [name for name in SIDES if name not in (OURS, *OF_ONE_VERB, *REFERENCES)]
        peers = listed(self.options["peers"], known)
        return Sides(task=self.task(), peers=peers, references=references)

    def case(self) -> Case:
        """The request; what options do not say is the model's own."""
        from ..benchmarks.case import Case

        names = ("width", "height", "steps", "guidance_scale", "sampler")
        named = {name: self.options.get(name) for name in names}
        return Case.of(self.package.manifest, **named, pictures=self.options.get("batch"))

    def pace(self) -> Pace:
        """How often sides run; --quick goes before --budget."""
        from ..benchmarks.rounds import Pace

        return Pace.quick() if self.quick else Pace(budget=self.options.get("budget", 60.0))


def _command(name: str, *shared: str, **own: tuple[Any, Any]) -> Callable[[Callable[..., None]], None]:
    """Make a verb of a function that takes `**options`: those of `_SHARED` with these names, and its own."""

    def register(command: Callable[..., None]) -> None:
        parameters = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for name, (kind, default) in {**{name: _SHARED[name] for name in shared}, **own}.items()
        ]
        setattr(command, "__signature__", inspect.Signature(parameters))  # noqa: B010
        bench.command(name)(command)

    return register


def _measures(*shared: str, **own: tuple[Any, Any]) -> Callable[[Callable[[Call], _Measure]], None]:
    """Make a verb of a function that answers how to measure; it has the options model, out, as_json besides.

    It writes and prints the document; exit code 1 if a row failed.
    """

    def register(verb: Callable[[Call], _Measure]) -> None:
        def command(**options: Any) -> None:
            call = Call(options)
            _show(options, verb(call), name=call.model.name)

        command.__doc__ = verb.__doc__
        _command(verb.__name__.replace("_", "-"), "model", *shared, "out", "as_json", **own)(command)

    return register


def _show(options: Mapping[str, Any], measure: _Measure, *, name: str | None = None) -> None:
    """Measure, write and print; `name` is what the model is called, if not as the document says."""
    from ..benchmarks.words import lines

    as_json, out = options["as_json"], options["out"]
    with _progress_lines(enabled=not as_json) as progress:
        found = measure(progress=progress)
    # folders of this machine are nobody's business, and mean nothing elsewhere
    words = [
        ",".join(Path(part).name if "/" in part else part for part in word.split(","))
        for word in sys.argv[1:]
    ]
    settings = {**found.settings, "command": shlex.join(["latentrt", *words])}
    model = found.model if name is None else {**found.model, "name": name}
    document = replace(found, model=model, settings=settings)
    if out:
        document.write(out)
    print(json.dumps(document.to_json()) if as_json else "\n".join(lines(document)))
    if document.failed:
        raise Exit(1)


@contextmanager
def _progress_lines(*, enabled: bool) -> Generator[Progress]:
    """A bar that says what is being done; how long it takes is not known."""
    with progress_bar(enabled=enabled) as advance:
        yield lambda line: advance(line, 0, 0)


# ── verbs that measure ─────────────────────────────────────────────────────────────────────────────


@_measures(
    *("checkpoint", "backend", "device", "peers", "width", "height", "steps", "batch"),
    *("threads", "budget", "quick"),
    workloads=_option(str, "", "With commas: text_encoder, invariants, unet, update, vae_decoder, picture."),
    references=_option(str, "latentrt again,yardstick,ceiling", "The first takes as much memory as ours."),
    guidance_scale=_option(float | None, None, "Guidance scale; 1 is off. Default: the model's."),
    sampler=_option(str, "dpmpp_2m", "One that every side has: ddim, euler, dpmpp_2m, …."),
    compile_mode=_option(str, "", "Of diffusers-compile: reduce-overhead compiles in a minute or two."),
)
def latency(call: Call) -> _Measure:
    """Time every stage and the whole picture, in turns with peers and with a second run of ours."""
    from ..benchmarks.case import WORKLOADS
    from ..benchmarks.sides.contract import REFERENCES
    from ..benchmarks.verbs.latency import measure_latency

    sides = call.sides(listed(call.options["references"], REFERENCES))
    chosen = listed(call.options["workloads"], WORKLOADS) or WORKLOADS
    return partial(measure_latency, call.package, sides, [call.case()], workloads=chosen, pace=call.pace())


@_measures(
    *("backend", "width", "height", "threads", "budget", "quick"),
    axes=_option(str, "", "With commas: steps, batch, pixels. Default: all."),
)
def scaling(call: Call) -> _Measure:
    """Cost against steps, batch and pixels, with the line through the points and what is left of it."""
    from ..benchmarks.verbs.scaling import AXES, measure_scaling

    chosen = {name: AXES[name].values for name in listed(call.options["axes"], AXES) or AXES}
    return partial(measure_scaling, call.package, call.task(), call.case(), axes=chosen, pace=call.pace())


@_measures("checkpoint", "backend", "device", "peers", "width", "height", "steps", "batch", "threads")
def memory(call: Call) -> _Measure:
    """Peak memory beside peers, the ledger of every net, and memory over one request."""
    from ..benchmarks.verbs.memory import measure_memory

    return partial(measure_memory, call.package, call.sides(), call.case())


@_measures(
    *("backend", "width", "height", "steps", "threads", "quick"),
    batches=_option(str, "1,2,4,8", "Pictures per call, with commas."),
    budget=_option(float, 240.0, "Seconds for each scenario.", least=1),
)
def throughput(call: Call) -> _Measure:
    """Pictures per second by batch, and MLPerf's scenarios SingleStream and Offline."""
    from ..benchmarks.rounds import Pace
    from ..benchmarks.verbs.throughput import Rules, measure_throughput

    rules = Rules.quick() if call.quick else Rules(budget=call.options["budget"])
    pace, batches = Pace.quick() if call.quick else Pace(), counts(call.options["batches"])
    return partial(
        measure_throughput, call.package, call.task(), call.case(), batches=batches, rules=rules, pace=pace
    )


@_measures("backend", "threads", "quick", repeats=_option(int, 7, "Fresh processes of each kind.", least=1))
def cold_start(call: Call) -> _Measure:
    """Fresh processes: import, open, first and second picture, each by itself."""
    from ..benchmarks.verbs.cold_start import QUICK_REPEATS, measure_cold_start

    times = QUICK_REPEATS if call.quick else call.options["repeats"]
    return partial(measure_cold_start, call.package, call.task(), repeats=times)


@_measures(
    backend=_option(str, "tensorrt-rtx", "tensorrt-rtx needs no GPU; tensorrt; of onnxruntime…: layouts."),
    profile=_option(list[str], (), "As for `latentrt build`. Default: the model's size, :b1-4."),
    nets=_option(str, "", "Only these, with commas. Default: all that get engines."),
    repeats=_option(int, 1, "Rounds, each into an empty store.", least=1),
)
def build(call: Call) -> _Measure:
    """Time and memory that building every engine takes, and the engines' size."""
    from ..benchmarks.verbs.build import Builds, measure_build
    from ..engines.profiles import Profile
    from ..engines.tensorrt.build import built_nets

    multiple = call.package.manifest.size_multiple
    builds = Builds(
        backend=call.options["backend"],
        profiles=tuple(Profile.parse(text, multiple=multiple) for text in call.options["profile"]),
        nets=listed(call.options["nets"], built_nets(call.package)),
        repeats=call.options["repeats"],
    )
    return partial(measure_build, call.package, builds)


@_measures(
    *("checkpoint", "backend", "width", "height", "threads", "quick"),
    reference=_option(str, "", "latentrt, onnxruntime, openvino, …. Default: diffusers, else onnxruntime."),
    samples=_option(int, 3, "Seeds and prompts of every row.", least=1),
    steps=_option(int, 8, "Number of inference steps.", least=1),
)
def parity(call: Call) -> _Measure:
    """Every net and whole pictures against a reference on the CPU, by a bar for each dtype."""
    from ..benchmarks.verbs.parity import Inputs, measure_parity

    inputs = Inputs(cases=(call.case(),), samples=1 if call.quick else call.options["samples"])
    return partial(measure_parity, call.package, call.task(), inputs, reference=call.options["reference"])


@_measures(
    *("checkpoint", "backend", "device", "width", "height", "steps", "batch", "threads", "budget", "quick"),
    packages=_option(
        str, "", "With commas: packages that `latentrt quantise` made of it, as FOLDER or FOLDER@BACKEND."
    ),
    peers=_option(str, "", "With commas: diffusers, openvino, openvino-nncf, sdcpp-f16, sdcpp-q8_0, …."),
    file=_option(Path | None, None, "The one-file checkpoint that the package is from, for peers' use."),
    workloads=_option(str, "", "With commas: text_encoder, unet, vae_decoder, picture. Default: all."),
    sampler=_option(str, "euler linspace", "One that all sides have by the same steps."),
    prompts=_option(
        int, 0, "The demo's held-out ones that each of our packages draws, to be judged.", least=0
    ),
)
def quantised(call: Call) -> _Measure:
    """Approximate packages and backends beside what is exact: time, memory, likeness, right pictures."""
    from ..benchmarks.sides.contract import OF_ONE_VERB, OURS, REFERENCES, ROUNDED_PEERS, SIDES
    from ..benchmarks.verbs.quantised import WORKLOADS, Inputs, measure_quantised, modes_of
    from ..engines.package import Package
    from ..engines.spec import TEXT_ENCODERS
    from ..runtime.model import SHIPPED

    options = call.options
    own = {OURS, *REFERENCES, *OF_ONE_VERB} - ROUNDED_PEERS.keys()
    named = [item.partition("@") for item in options["packages"].split(",") if item]
    modes = modes_of(
        call.package,
        call.task(),
        [
            (Package.open(SHIPPED.get(folder, Path(folder))), backend or options["backend"])
            for folder, _, backend in named
        ],
        listed(options["peers"], [name for name in SIDES if name not in own]),
        file=options["file"],
    )
    usual = [name for name in WORKLOADS if name not in TEXT_ENCODERS or name in call.package.manifest.nets]
    inputs = Inputs(
        case=call.case(),
        workloads=tuple(listed(options["workloads"], WORKLOADS) or usual),
        prompts=options["prompts"],
    )
    return partial(measure_quantised, call.package, modes, inputs, pace=call.pace())


@_command(
    "steps",
    *("threads", "out", "as_json"),
    prompts=_option(int, 100, "How many of the demo's held-out prompts.", least=1),
    calls=_option(str, "4,5,6,8,10,12,15,20,30", "Of the UNet for a picture, with commas."),
    samplers=_option(str, "", "With commas, as in the document. Default: all of them."),
)
def steps(**options: Any) -> None:
    """How right the demo's pictures are after so many calls of the UNet, and how near the end of the path."""
    from ..benchmarks.sides.contract import Task
    from ..benchmarks.verbs.steps import VARIANTS, Inputs, measure_steps
    from ..engines.processors import thread_count
    from ..runtime.pipeline import Pipeline

    threads = None if options["threads"] is None else thread_count(options["threads"])
    inputs = Inputs(
        prompts=options["prompts"],
        calls=tuple(counts(options["calls"], "--calls")),
        variants=tuple(listed(options["samplers"], VARIANTS)) or tuple(VARIANTS),
    )
    with Pipeline.open("demo", backend="onnxruntime", device="cpu", threads=threads) as pipe:
        task = Task(model=pipe.package.root, backend="onnxruntime", threads=threads, device="cpu")
        _show(options, partial(measure_steps, pipe, task, inputs))


@_command(
    "opening",
    *("threads", "out", "as_json"),
    checkpoint=(Annotated[Path, Argument(help="A checkpoint's file, or for some ways a folder.")], ...),
    width=_option(int, 128, "Pixels.", least=8),
    height=_option(int, 128, "Pixels.", least=8),
    ways=_option(str, "", "With commas: opened, templates, traced, diffusers, sdcpp. Default: all."),
    rounds=_option(int, 1, "How often each way is gone.", least=1),
    sdcpp=_option(Path | None, None, "A Python interpreter with cyllama, which has stable-diffusion.cpp."),
)
def opening(**options: Any) -> None:
    """From a checkpoint to its first picture, of one step: time, memory and disk of ours and of other ways.

    Fresh processes on the CPU, with an empty cache and with a filled one. Torch traces for minutes; what is
    kept goes to the system's folder for temporary files (TMPDIR), and away again.
    """
    from ..benchmarks.verbs.first_picture import WAYS
    from ..benchmarks.verbs.opening import measure_opening
    from ..engines.processors import thread_count

    threads = options["threads"]
    measure = partial(
        measure_opening,
        options["checkpoint"],
        width=options["width"],
        height=options["height"],
        ways=listed(options["ways"], WAYS) or tuple(WAYS),
        rounds=options["rounds"],
        threads=None if threads is None else thread_count(threads),
        sdcpp=options["sdcpp"],
    )
    _show(options, measure)


@_measures(
    *("checkpoint", "backend", "threads", "budget", "quick"),
    width=_option(int, 128, "Pixels.", least=8),
    height=_option(int, 128, "Pixels.", least=8),
    loras=_option(str, "", "With commas: all, keys, text; none: a step without adapters. Default: these."),
    rank=_option(int, 16, "Of the files, which are made.", least=1),
    rounds=_option(int, 3, "How often each side is opened and goes through the files.", least=1),
    peers=_option(str, "diffusers", "diffusers, or nothing."),
    steps=_option(int, 8, "Of the picture without adapters; those with them have one.", least=1),
)
def adapters(call: Call) -> _Measure:
    """What a change of adapters costs: load, new set, open set, back to none; beside diffusers.

    Files with random weights are made in the system's folder for temporary files (TMPDIR). --budget is for
    the steps without adapters: of a pipeline that never saw one, and of one that has some and uses none.
    """
    from ..benchmarks.verbs.adapters import LORAS, PEERS, Changes, measure_adapters

    changes = Changes(
        loras=listed(call.options["loras"], LORAS) or LORAS,
        rank=call.options["rank"],
        rounds=1 if call.quick else call.options["rounds"],
        peers=listed(call.options["peers"], PEERS),
    )
    return partial(
        measure_adapters, call.package, call.task(), call.case(), changes=changes, pace=call.pace()
    )


@_measures(
    *("checkpoint", "backend", "threads", "budget", "quick"),
    width=_option(int, 128, "Pixels.", least=8),
    height=_option(int, 128, "Pixels.", least=8),
    rounds=_option(int, 3, "How often each side is opened.", least=1),
    peers=_option(str, "diffusers", "diffusers, or nothing."),
    steps=_option(int, 8, "Number of inference steps.", least=2),
)
def controls(call: Call) -> _Measure:
    """What a ControlNet costs a step, beside diffusers; and that a step takes as long where none is used.

    One with random weights is made in the system's folder for temporary files (TMPDIR). --budget is for all
    rounds of each of the two comparisons.
    """
    from ..benchmarks.verbs.controls import PEERS, Comparison, measure_controls

    comparison = Comparison(
        rounds=1 if call.quick else call.options["rounds"], peers=listed(call.options["peers"], PEERS)
    )
    return partial(
        measure_controls, call.package, call.task(), call.case(), comparison=comparison, pace=call.pace()
    )


@_measures(
    *("backend", "width", "height", "steps", "threads"),
    loads=_option(str, "0.6,0.9,1.2", "Shares of what one at a time draws, with commas."),
    rounds=_option(int, 3, "In which every way has a run at every load.", least=1),
    requests=_option(int, 100, "That count, of each run.", least=2),
    jobs=_option(int, 8, "That wait or are drawn at most at a load above 1; one more is refused.", least=1),
    rows=_option(int | None, None, "Of a shared call of the UNet. Default: measured.", least=1),
    quick=_option(bool, False, "Few runs, short ones, one at each load.", "--quick"),
)
def serve(call: Call) -> _Measure:
    """Requests that arrive by themselves: drawn one at a time, in equal batches, and in shared steps.

    Mixed ones, in a Poisson process. Latencies count from the moment a request was due. Nothing goes over a
    network. The same is simulated, with this machine's costs and with those that a GPU might have.
    """
    from ..benchmarks.verbs.serve import LoadRules, measure_serve

    own = {name: call.options[name] for name in ("rounds", "requests", "jobs", "rows")}
    loads = shares(call.options["loads"])
    rules = LoadRules(loads=loads, **own)
    if call.quick:
        rules = LoadRules.quick(loads=loads, jobs=own["jobs"], rows=own["rows"])
    return partial(measure_serve, call.package, call.task(), call.case(), rules=rules)


@_measures(
    *("backend", "width", "height", "steps", "threads"),
    serve=_option(str, "", "Address of a running `latentrt serve` with this model."),
    triton=_option(str, "", "HTTP address of a running Triton with this model's repository."),
    ray=_option(str, "", "Address of the application in a running Ray Serve."),
    rounds=_option(int, 12, "In which every side has a turn with one caller, and one with all.", least=1),
    requests=_option(int, 10, "Of a turn, by each caller.", least=1),
    callers=_option(int, 4, "Who ask at once, where there are several.", least=2),
)
def hosts(call: Call) -> _Measure:
    """What a server in between costs, beside the same pictures drawn in this process."""
    from ..benchmarks.verbs.hosts import HostRules, measure_hosts

    names = {"serve": "latentrt serve", "triton": "Triton", "ray": "Ray Serve"}
    servers = {name: call.options[option] for option, name in names.items() if call.options[option]}
    rules = HostRules(**{name: call.options[name] for name in ("rounds", "requests", "callers")})
    return partial(measure_hosts, call.package, call.task(), call.case(), servers=servers, rules=rules)


# ── other verbs ────────────────────────────────────────────────────────────────────────────────────


@bench.command()
def gpu(
    package: Annotated[str, Option(help="The shipped model, demo, or a package folder.")] = "demo",
    minutes: Annotated[float, Option(help="For all of it.")] = 12,
    steps: Annotated[str, Option(help="Only these, with commas: unet,whole,…. Default: the plan.")] = "",
    out: _OUT = None,
) -> None:
    """What only a GPU can show, in the order of what it is worth. Exit code 4: there is none."""
    from ..benchmarks.gpu.check import main

    where = [*(["--steps", steps] if steps else []), *(["--out", str(out)] if out else [])]
    raise Exit(main(["--package", package, "--minutes", str(minutes), *where]))


@bench.command()
def compare(
    before: Annotated[Path, Argument(help="A document of `latentrt bench`.")],
    after: Annotated[Path, Argument(help="Another of the same verb, model and machine.")],
    threshold: Annotated[float, Option(min=0, max=1, help="The smallest change that counts.")] = 0.05,
    as_json: _JSON = False,
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
    readme: Annotated[Path | None, Option(help="Gets the short table, between its markers.")] = None,
    measurements: Annotated[Path | None, Option(help="Gets all tables, between its markers.")] = None,
    figures: Annotated[Path | None, Option(help="Of the PNGs. Default: `figures` in the folder.")] = None,
    as_json: _JSON = False,
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


@_command(
    "all",
    *("checkpoint", "backend", "device", "peers", "threads", "quick"),
    folder=(Annotated[Path, Argument(help="Where the documents go, VERB-MODEL.json each.")], ...),
    model=_option(str, "demo", "As for the other verbs."),
)
def everything(**options: Any) -> None:
    """Every verb that measures, one after the other; --quick ends within two minutes for the demo model."""
    from ..benchmarks.sides.contract import REFERENCES
    from ..benchmarks.verbs.suite import measure_all

    call, folder = Call(options), options["folder"]
    failed = False
    with _progress_lines(enabled=True) as progress:
        sides = call.sides(REFERENCES)
        for path, document in measure_all(call.model, sides, folder, quick=call.quick, progress=progress):
            print(f"{path}: {len(document.rows)} rows{', of which some FAILED' if document.failed else ''}")
            failed = failed or document.failed
    if failed:
        raise Exit(1)


# ── what options say ───────────────────────────────────────────────────────────────────────────────


def device_of(backend: str, device: str) -> str:
    """Where peers run: "auto" is where our backend does."""
    from ..engines.backend import choose_backend
    from ..engines.backends import BACKENDS
    from ..engines.errors import LatentrtError

    if device != "auto":
        return device
    with suppress(LatentrtError):  # our side says by itself why it cannot be opened
        return "cuda" if BACKENDS[choose_backend(backend)[0]].on_device else "cpu"
    return "cpu"


def listed(text: str, known: Iterable[str]) -> tuple[str, ...]:
    """The names in a list with commas. Raises UsageError for one that is not known."""
    from ..engines.errors import UsageError

    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if wrong := [name for name in names if name not in known]:
        raise UsageError(
            f"unknown name {wrong[0]!r}",
            expected=", ".join(known),
            fix="Choose of these, with commas between.",
        )
    return names


def counts(text: str, option: str = "--batches") -> tuple[int, ...]:
    """Numbers of at least 1 in a list with commas. Raises UsageError for anything else."""
    from ..engines.errors import UsageError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UsageError(
            f"{option} is {text!r}", expected="numbers with commas between", fix=f"Say: {option} 1,2,4,8."
        )
    return tuple(map(int, parts))


def shares(text: str) -> tuple[float, ...]:
    """Finite numbers above 0 in a list with commas. Raises UsageError for anything else."""
    from ..engines.errors import UsageError

    try:
        found = tuple(map(float, text.split(",")))
    except ValueError:
        found = ()
    if not found or not all(0 < share < inf for share in found):
        raise UsageError(
            f"the loads are {text!r}",
            expected="numbers above 0 with commas between",
            fix="Say: --loads 0.6,0.9,1.2.",
        )
    return found
