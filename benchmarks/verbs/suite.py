"""`latentrt bench all`: every verb that measures, one document each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from ..case import Case
from ..models.open import Model
from ..records import Document
from ..rounds import Pace
from .build import Builds, measure_build
from .cold_start import QUICK_REPEATS, REPEATS, measure_cold_start
from .latency import Progress, Sides, measure_latency, silent
from .memory import STEPS, measure_memory
from .parity import QUICK_SAMPLES, SAMPLES, Inputs, measure_parity
from .scaling import AXES, measure_scaling
from .throughput import Rules, measure_throughput

WATCHED_STEPS = 60  # of memory's request in a quick run


class Measure(Protocol):
    """One verb at its default case. `quick` changes nothing but how often it measures, at how many points."""

    def __call__(self, model: Model, sides: Sides, *, quick: bool, progress: Progress) -> Document:
        """The document."""
        ...


def measure_all(
    model: Model, sides: Sides, folder: Path, *, quick: bool, progress: Progress = silent
) -> Iterator[tuple[Path, Document]]:
    """Write a document of each verb into `folder` as soon as it is known, and yield it.

    With `quick`, all verbs take the demo model less than two minutes on two cores.

    Raises:
        SideError: our own side cannot be opened.
    """
    for verb, measure in VERBS.items():

        def within(line: str, verb: str = verb) -> None:
            progress(f"{verb}: {line}")

        found = measure(model, sides, quick=quick, progress=within)
        document = replace(found, model={**found.model, "name": model.name})
        path = folder / f"{verb}-{re.sub(r'[^a-z0-9]+', '-', model.name.lower()).strip('-')}.json"
        document.write(path)
        yield path, document


def _latency(model: Model, sides: Sides, *, quick: bool, progress: Progress) -> Document:
    case = Case.of(model.package.manifest)
    return measure_latency(model.package, sides, [case], pace=_pace(quick=quick), progress=progress)


def _memory(model: Model, sides: Sides, *, quick: bool, progress: Progress) -> Document:
    alone = replace(sides, references=())
    steps = WATCHED_STEPS if quick else STEPS
    return measure_memory(
        model.package, alone, Case.of(model.package.manifest), steps=steps, progress=progress
    )


def _throughput(model: Model, sides: Sides, *, quick: bool, progress: Progress) -> Document:
    return measure_throughput(
        model.package,
        sides.task,
        Case.of(model.package.manifest),
        batches=(1, 4) if quick else (1, 2, 4, 8),
        rules=Rules.quick() if quick else Rules(),
        pace=_pace(quick=quick),
        progress=progress,
    )


def _scaling(model: Model, sides: Sides, *, quick: bool, progress: Progress) -> Document:
    points = 3 if quick else None  # a line with a residual needs three
    axes = {name: axis.values[:points] for name, axis in AXES.items()}
    case = Case.of(model.package.manifest)
    return measure_scaling(
        model.package, sides.task, case, axes=axes, pace=_pace(quick=quick), progress=progress
    )


def _cold_start(model: Model, sides: Sides, *, quick: bool, progress: Progress) -> Document:
    repeats = QUICK_REPEATS if quick else REPEATS
    return measure_cold_start(model.package, sides.task, repeats=repeats, said=progress)


def _parity(model: Model, sides: Sides, *, quick: bool, progress: Progress) -> Document:
    cases = (Case.of(model.package.manifest, steps=8),)
    inputs = Inputs(cases=cases, samples=QUICK_SAMPLES if quick else SAMPLES)
    return measure_parity(model.package, sides.task, inputs, progress=progress)


def _build(model: Model, sides: Sides, *, quick: bool, progress: Progress) -> Document:
    return measure_build(model.package, Builds(), said=progress)


def _pace(*, quick: bool) -> Pace:
    return Pace.quick() if quick else Pace()


VERBS: Mapping[str, Measure] = {
    "latency": _latency,
    "memory": _memory,
    "throughput": _throughput,
    "scaling": _scaling,
    "cold-start": _cold_start,
    "parity": _parity,
    "build": _build,
}
