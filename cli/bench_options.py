"""What the verbs of `latentrt bench` share: options, and what is done with them."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Exit, Option

from .progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    from ..benchmarks.models.open import Model
    from ..benchmarks.records import Document
    from ..benchmarks.rounds import Pace
    from ..benchmarks.sides.contract import Task
    from ..benchmarks.verbs.latency import Progress, Sides

DEVICES = ("cpu", "cuda")

ModelName = Annotated[
    str, Argument(help="`demo`, a package folder, or a full-size model of random weights: sd15-fp32, ….")
]
Checkpoint = Annotated[
    Path | None, Option(help="The diffusers folder that the package was exported from, for diffusers.")
]
Backend = Annotated[str, Option(help="latentrt's own: auto, onnxruntime, onnxruntime-cuda, tensorrt, ….")]
Device = Annotated[
    str, Option(help="Of peers that run on both: cpu, cuda. Default: where latentrt's own backend runs.")
]
Threads = Annotated[int | None, Option(min=1, help="Of every side on a CPU. Default: every processor.")]
Peers = Annotated[str, Option(help="With commas: diffusers, diffusers-compile, onnxruntime, openvino, ….")]
Width = Annotated[int | None, Option(help="Pixels. Default: the model's.")]
Height = Annotated[int | None, Option(help="Pixels. Default: the model's.")]
Steps = Annotated[int, Option(min=1, help="Number of inference steps.")]
Batch = Annotated[int, Option(min=1, help="Pictures drawn at once.")]
Guidance = Annotated[float | None, Option(help="Guidance scale; 1 is off. Default: the model's.")]
Sampler = Annotated[str, Option(help="One that every side has: ddim, euler, dpmpp_2m, ….")]
Budget = Annotated[float, Option(help="Seconds for all sides of one workload, or for one axis.")]
Quick = Annotated[bool, Option("--quick", help="Few runs: minutes become seconds, and intervals wide.")]
Out = Annotated[Path | None, Option("--out", help="Write the JSON document here.")]
AsJson = Annotated[bool, Option("--json", help="Print the JSON document.")]


def find(name: str, checkpoint: Path | None = None) -> Model:
    """The model of that name, made if need be. Raises as `benchmarks.models.find_model`."""
    from ..benchmarks.models.open import find_model

    return find_model(name, checkpoint=checkpoint, said=lambda line: print(line, file=sys.stderr))


def task_of(model: Model, backend: str, threads: int | None = None, device: str = "auto") -> Task:
    """What every side opens. Raises UsageError for an unknown device."""
    from ..benchmarks.sides.contract import Task

    return Task(
        package=model.package.root,
        checkpoint=model.checkpoint,
        backend=backend,
        threads=threads,
        device=device_of(backend, device),
    )


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


def sides_of(task: Task, peers: str, references: tuple[str, ...]) -> Sides:
    """Ours, the peers of a list with commas, and the references. Raises UsageError for an unknown peer."""
    from ..benchmarks.sides.contract import OURS, REFERENCES, SIDES, WATCHED
    from ..benchmarks.verbs.latency import Sides

    known = [name for name in SIDES if name not in (OURS, WATCHED, *REFERENCES)]
    return Sides(task=task, peers=listed(peers, known), references=references)


def pace_of(budget: float, *, quick: bool) -> Pace:
    """How often sides run; `quick` goes before the budget."""
    from ..benchmarks.rounds import Pace

    return Pace.quick() if quick else Pace(budget=budget)


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


@contextmanager
def progress_lines(*, enabled: bool) -> Generator[Progress]:
    """A bar that says what is being done; how long it takes is not known."""
    with progress_bar(enabled=enabled) as advance:
        yield lambda line: advance(line, 0, 0)


def measured(model: Model, out: Path | None, measure: Callable[..., Document], *, as_json: bool) -> None:
    """Measure with a progress bar, write and print the document; exit code 1 if a row failed."""
    from dataclasses import replace

    from ..benchmarks.printing import lines

    with progress_lines(enabled=not as_json) as progress:
        found = measure(progress=progress)
    # folders of this machine are nobody's business, and mean nothing elsewhere
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    settings = {**found.settings, "command": " ".join(["latentrt", *words])}
    document = replace(found, model={**found.model, "name": model.name}, settings=settings)
    if out is not None:
        document.write(out)
    print(json.dumps(document.to_json()) if as_json else "\n".join(lines(document)))
    if document.failed:
        raise Exit(1)
