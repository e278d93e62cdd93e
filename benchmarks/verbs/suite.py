"""`latentrt bench all`: every verb that measures, one document each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..case import Case
from ..models.open import Model
from ..records import Document
from ..rounds import Pace
from .build import Builds, measure_build
from .cold_start import QUICK_REPEATS, REPEATS, measure_cold_start
from .latency import Said, Sides, measure_latency
from .memory import STEPS, measure_memory
from .parity import QUICK_SAMPLES, SAMPLES, Inputs, measure_parity
from .scaling import AXES, measure_scaling
from .throughput import Rules, measure_throughput


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much of each verb. Nothing here changes what is measured, only how often, and at how many points.

    Attributes:
        pace: of latency, scaling and the batch sweep.
        rules: of throughput's scenarios.
        repeats: of cold-start.
        samples: of parity.
        watched: steps of memory's requests, as in `measure_memory`.
        points: of each axis of scaling, from its first; a line needs three.
        steps: of a picture.
        batches: of the batch sweep.
    """

    pace: Pace
    rules: Rules
    repeats: int
    samples: int
    watched: tuple[int, int, int] = STEPS
    points: int | None = None
    steps: int = 20
    batches: tuple[int, ...] = (1, 2, 4, 8)

    @classmethod
    def full(cls) -> Effort:
        """Minutes per verb."""
        return cls(pace=Pace(), rules=Rules(), repeats=REPEATS, samples=SAMPLES)

    @classmethod
    def quick(cls) -> Effort:
        """A look at the demo model: all verbs within two minutes on two cores."""
        return cls(
            pace=Pace.quick(),
            rules=Rules.quick(),
            repeats=QUICK_REPEATS,
            samples=QUICK_SAMPLES,
            watched=(60, 10, 40),
            points=3,
            batches=(1, 4),
        )


def measure_all(
    model: Model, sides: Sides, folder: Path, *, quick: bool, said: Said = lambda line: None
) -> Iterator[tuple[Path, Document]]:
    """Write a document of each verb into `folder` as soon as it is known, and yield it.

    Raises:
        SideError: our own side cannot be opened.
    """
    effort = Effort.quick() if quick else Effort.full()
    for verb, measure in VERBS.items():
        said(verb)
        found = measure(model, sides, effort, lambda line, verb=verb: said(f"{verb}: {line}"))
        document = replace(found, model={**found.model, "name": model.name})
        path = folder / f"{verb}-{re.sub(r'[^a-z0-9]+', '-', model.name.lower()).strip('-')}.json"
        document.write(path)
        yield path, document


Measure = Callable[[Model, Sides, Effort, Said], Document]


def _latency(model: Model, sides: Sides, effort: Effort, said: Said) -> Document:
    case = Case.of(model.package.manifest, steps=effort.steps)
    return measure_latency(model.package, sides, [case], pace=effort.pace, said=said)


def _memory(model: Model, sides: Sides, effort: Effort, said: Said) -> Document:
    case = Case.of(model.package.manifest, steps=effort.steps)
    return measure_memory(model.package, replace(sides, references=()), case, steps=effort.watched, said=said)


def _throughput(model: Model, sides: Sides, effort: Effort, said: Said) -> Document:
    case = Case.of(model.package.manifest, steps=effort.steps)
    return measure_throughput(
        model.package,
        sides.task,
        case,
        batches=effort.batches,
        rules=effort.rules,
        pace=effort.pace,
        said=said,
    )


def _scaling(model: Model, sides: Sides, effort: Effort, said: Said) -> Document:
    case = Case.of(model.package.manifest)
    axes = {name: axis.values[: effort.points] for name, axis in AXES.items()}
    return measure_scaling(model.package, sides.task, case, axes=axes, pace=effort.pace, said=said)


def _cold_start(model: Model, sides: Sides, effort: Effort, said: Said) -> Document:
    return measure_cold_start(model.package, sides.task, repeats=effort.repeats, said=said)


def _parity(model: Model, sides: Sides, effort: Effort, said: Said) -> Document:
    inputs = Inputs(cases=(Case.of(model.package.manifest, steps=8),), samples=effort.samples)
    return measure_parity(model.package, sides.task, inputs, said=said)


def _build(model: Model, sides: Sides, effort: Effort, said: Said) -> Document:
    return measure_build(model.package, Builds(), said=said)


VERBS: Mapping[str, Measure] = {
    "latency": _latency,
    "memory": _memory,
    "throughput": _throughput,
    "scaling": _scaling,
    "cold-start": _cold_start,
    "parity": _parity,
    "build": _build,
}
