"""`latentrt bench`: how fast, how much memory, against what, how far from the limit, is it still right."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

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
DEVICES = ("cpu", "cuda")
_Measure: TypeAlias = "Callable[..., Document]"  # with the keyword `progress`
_PIXELS = Annotated[int | None, Option(help="Pixels. Default: the model's.")]
_OUT = Annotated[Path | None, Option("--out", help="Write the JSON document here.")]
_JSON = Annotated[bool, Option("--json", help="Print the JSON document.")]


def _option(kind: Any, default: Any, text: str, *flags: str, least: int | None = None) -> tuple[Any, Any]:
    return Annotated[kind, Option(*flags, help=text, min=least)], default


# The options that verbs share: what typer makes of them, and their defaults.
_SHARED: Mapping[str, tuple[Any, Any]] = {
    "model": (
        Annotated[
            str,
            Argument(help="`demo`, a package folder, or a full-size model of random weights: sd15-fp32, …."),
        ],
        "demo",
    ),
    "checkpoint": _option(
        Path | None, None, "The diffusers folder that the package was exported from, for diffusers."
    ),
    "backend": _option(str, "auto", "latentrt's own: auto, onnxruntime, onnxruntime-cuda, tensorrt, …."),
    "device": _option(
        str, "auto", "Of peers that run on both: cpu, cuda. Default: where latentrt's own backend runs."
    ),
    "peers": _option(str, "", "With commas: diffusers, diffusers-compile, onnxruntime, openvino, …."),
    "width": (_PIXELS, None),
    "height": (_PIXELS, None),
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
        self.model = find_model(
            options["model"],
            checkpoint=options.get("checkpoint"),
            said=lambda line: print(line, file=sys.stderr),
        )
        self.package = self.model.package
        self.quick = bool(options.get("quick"))

    def task(self) -> Task:
        """What every side opens. Raises UsageError for an unknown device."""
        from ..benchmarks.sides.contract import Task
        from ..engines.processors import thread_count

        backend, threads = self.options["backend"], self.options["threads"]
        return Task(
            package=self.package.root,
            checkpoint=self.model.checkpoint,
            backend=backend,
            threads=None if threads is None else thread_count(threads),
            device=device_of(backend, self.options.get("device", "auto")),
        )

    def sides(self, references: tuple[str, ...] = ()) -> Sides:
        """Ours, the peers that are named, and the references. Raises UsageError for an unknown peer."""
        from ..benchmarks.sides.contract import OURS, REFERENCES, SIDES, WATCHED
        from ..benchmarks.verbs.latency import Sides

        known = [name for name in SIDES if name not in (OURS, WATCHED, *REFERENCES)]
        peers = listed(self.options["peers"], known)
        return Sides(task=self.task(), peers=peers, references=references)

    def case(self, **changes: Any) -> Case:
        """The request; what neither options nor `changes` say is the model's own."""
        from ..benchmarks.case import Case

        named = {name: self.options.get(name) for name in ("width", "height", "steps")}
        return Case.of(self.package.manifest, **named, pictures=self.options.get("batch"), **changes)

    def pace(self) -> Pace:
        """How often sides run; --quick goes before --budget."""
        from ..benchmarks.rounds import Pace

        return Pace.quick() if self.quick else Pace(budget=self.options.get("budget", 60.0))


def _options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that takes `**options` those of `_SHARED` with these names, but for its own ones."""

    def add(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [item for item in signature.parameters.values() if item.kind is not item.VAR_KEYWORD]
        shared = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for name in names
            for kind, default in [_SHARED[name]]
            if name not in signature.parameters
        ]
        setattr(command, "__signature__", signature.replace(parameters=[*own, *shared]))  # noqa: B010
        return command

    return add


def _measures(*names: str, name: str | None = None) -> Callable[[Callable[..., Any]], None]:
    """Make a verb of a function that answers how to measure.

    Besides the function's own keywords the command has shared options: those named here, model, out, as_json.
    It writes and prints the document; exit code 1 if a row failed.
    """

    def register(verb: Callable[..., _Measure]) -> None:
        signature = inspect.signature(verb, eval_str=True)
        own = [item for item in signature.parameters.values() if item.kind is item.KEYWORD_ONLY]

        def command(**options: Any) -> None:
            call = Call(options)
            measure = verb(call, **{item.name: options[item.name] for item in own})
            _show(call, measure, options["out"], as_json=options["as_json"])

        setattr(command, "__signature__", inspect.Signature(own))  # noqa: B010
        command.__doc__ = verb.__doc__
        bench.command(name or verb.__name__)(_options("model", *names, "out", "as_json")(command))

    return register


def _show(call: Call, measure: _Measure, out: Path | None, *, as_json: bool) -> None:
    from dataclasses import replace

    from ..benchmarks.printing import lines

    with _progress_lines(enabled=not as_json) as progress:
        found = measure(progress=progress)
    # folders of this machine are nobody's business, and mean nothing elsewhere
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    settings = {**found.settings, "command": " ".join(["latentrt", *words])}
    document = replace(found, model={**found.model, "name": call.model.name}, settings=settings)
    if out is not None:
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
)
def latency(
    call: Call,
    *,
    workloads: Annotated[
        str, Option(help="With commas: text_encoder, invariants, unet, update, vae_decoder, picture.")
    ] = "",
    references: Annotated[
        str,
        Option(
            help='With commas: "latentrt again", yardstick, ceiling. The first takes as much memory as ours.'
        ),
    ] = "latentrt again,yardstick,ceiling",
    guidance_scale: Annotated[
        float | None, Option(help="Guidance scale; 1 is off. Default: the model's.")
    ] = None,
    sampler: Annotated[str, Option(help="One that every side has: ddim, euler, dpmpp_2m, ….")] = "dpmpp_2m",
) -> _Measure:
    """Time every stage and the whole picture, in turns with peers and with a second run of ours."""
    from ..benchmarks.case import WORKLOADS
    from ..benchmarks.sides.contract import REFERENCES
    from ..benchmarks.verbs.latency import measure_latency

    sides = call.sides(listed(references, REFERENCES))
    case = call.case(guidance_scale=guidance_scale, sampler=sampler)
    chosen = listed(workloads, WORKLOADS) or WORKLOADS
    return partial(measure_latency, call.package, sides, [case], workloads=chosen, pace=call.pace())


@_measures("backend", "width", "height", "threads", "budget", "quick")
def scaling(
    call: Call,
    *,
    axes: Annotated[str, Option(help="With commas: steps, batch, pixels. Default: all.")] = "",
) -> _Measure:
    """Cost against steps, batch and pixels, with the line through the points and what is left of it."""
    from ..benchmarks.verbs.scaling import AXES, measure_scaling

    chosen = {name: AXES[name].values for name in listed(axes, AXES) or AXES}
    return partial(measure_scaling, call.package, call.task(), call.case(), axes=chosen, pace=call.pace())


@_measures("checkpoint", "backend", "device", "peers", "width", "height", "steps", "batch", "threads")
def memory(call: Call) -> _Measure:
    """Peak memory beside peers, the ledger of every net, and memory over one request."""
    from ..benchmarks.verbs.memory import measure_memory

    return partial(measure_memory, call.package, call.sides(), call.case())


@_measures("backend", "width", "height", "steps", "threads", "quick")
def throughput(
    call: Call,
    *,
    batches: Annotated[str, Option(help="Pictures per call, with commas.")] = "1,2,4,8",
    budget: Annotated[float, Option(min=1.0, help="Seconds for each scenario.")] = 240.0,
) -> _Measure:
    """Pictures per second by batch, and MLPerf's scenarios SingleStream and Offline."""
    from ..benchmarks.rounds import Pace
    from ..benchmarks.verbs.throughput import Rules, measure_throughput

    rules = Rules.quick() if call.quick else Rules(budget=budget)
    options = {"batches": counts(batches), "rules": rules, "pace": Pace.quick() if call.quick else Pace()}
    return partial(measure_throughput, call.package, call.task(), call.case(), **options)


@_measures("backend", "threads", "quick", name="cold-start")
def cold_start(
    call: Call, *, repeats: Annotated[int, Option(min=1, help="Fresh processes of each kind.")] = 7
) -> _Measure:
    """Fresh processes: import, open, first and second picture, each by itself."""
    from ..benchmarks.verbs.cold_start import QUICK_REPEATS, measure_cold_start

    times = QUICK_REPEATS if call.quick else repeats
    return partial(measure_cold_start, call.package, call.task(), repeats=times)


@_measures()
def build(
    call: Call,
    *,
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
) -> _Measure:
    """Time and memory that building every engine takes, and the engines' size."""
    from ..benchmarks.verbs.build import Builds, measure_build
    from ..engines.profiles import Profile
    from ..engines.tensorrt.build import built_nets

    multiple = call.package.manifest.size_multiple
    builds = Builds(
        backend=backend,
        profiles=tuple(Profile.parse(text, multiple=multiple) for text in profile or ()),
        nets=listed(nets, built_nets(call.package)),
        repeats=repeats,
    )
    return partial(measure_build, call.package, builds)


@_measures("checkpoint", "backend", "width", "height", "threads", "quick")
def parity(
    call: Call,
    *,
    reference: Annotated[
        str,
        Option(
            help="latentrt on ONNX Runtime's CPU, diffusers, onnxruntime, openvino, …."
            " Default: diffusers, or without it or a checkpoint onnxruntime."
        ),
    ] = "",
    samples: Annotated[int, Option(min=1, help="Seeds and prompts of every row.")] = 3,
    steps: Annotated[int, Option(min=1, help="Number of inference steps.")] = 8,
) -> _Measure:
    """Every net and whole pictures against a reference on the CPU, by a bar for each dtype."""
    from ..benchmarks.verbs.parity import Inputs, Reference, measure_parity

    inputs = Inputs(cases=(call.case(),), samples=1 if call.quick else samples)
    task = call.task()
    return partial(measure_parity, call.package, task, inputs, reference=Reference.of(task, reference))


# ── other verbs ────────────────────────────────────────────────────────────────────────────────────


@bench.command()
def gpu(
    package: Annotated[str, Option(help="The shipped model, demo, or a package folder.")] = "demo",
    out: _OUT = None,
) -> None:
    """All that only a GPU can show, in under ten minutes. Exit code 4: there is none."""
    from ..benchmarks.gpu.check import main

    raise Exit(main(["--package", package, *(["--out", str(out)] if out else [])]))


@bench.command()
def compare(
    before: Annotated[Path, Argument(help="A document of `latentrt bench`.")],
    after: Annotated[Path, Argument(help="Another of the same verb, model and machine.")],
    threshold: Annotated[float, Option(help="The smallest change that counts: 0.05 is 5 %.")] = 0.05,
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
    readme: Annotated[
        Path | None, Option(help="Gets the short table between bench-summary:begin and bench-summary:end.")
    ] = None,
    measurements: Annotated[
        Path | None, Option(help="Gets all tables and figures between bench:begin and bench:end.")
    ] = None,
    figures: Annotated[
        Path | None, Option(help="Folder for the PNGs. Default: `figures` beside the documents.")
    ] = None,
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


@bench.command("all")
@_options("checkpoint", "backend", "device", "peers", "threads", "quick")
def everything(
    folder: Annotated[Path, Argument(help="Where the documents go, VERB-MODEL.json each.")],
    model: Annotated[str, Option(help="As for the other verbs.")] = "demo",
    **options: Any,
) -> None:
    """Every verb that measures, one after the other; --quick ends within two minutes for the demo model."""
    from ..benchmarks.sides.contract import REFERENCES
    from ..benchmarks.verbs.suite import measure_all

    call = Call({**options, "model": model})
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
    """Where peers run: "auto" is where our backend does. Raises UsageError for an unknown device."""
    from ..engines.backend import choose_backend
    from ..engines.errors import LatentrtError, UsageError

    if device in DEVICES:
        return device
    if device != "auto":
        raise UsageError(
            f"unknown device {device!r}", expected=f"auto, {', '.join(DEVICES)}", fix="Leave --device out."
        )
    with suppress(LatentrtError):  # our side says by itself why it cannot be opened
        return "cpu" if choose_backend(backend)[0] == "onnxruntime" else "cuda"
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


def counts(text: str) -> tuple[int, ...]:
    """Numbers of at least 1 in a list with commas. Raises UsageError for anything else."""
    from ..engines.errors import UsageError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UsageError(
            f"the batches are {text!r}", expected="numbers with commas between", fix="Say: --batches 1,2,4,8."
        )
    return tuple(map(int, parts))
