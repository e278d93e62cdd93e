"""`latentrt bench all`: every verb that measures, one document each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..case import Case
from ..models.open import Model
from ..records import Document
from ..rounds import Pace
from .build import Builds, measure_build
from .cold_start import QUICK_REPEATS, REPEATS, measure_cold_start
from .latency import Progress, Sides, measure_latency, silent
from .memory import STEPS, measure_memory
from .parity import Inputs, measure_parity
from .scaling import AXES, measure_scaling
from .throughput import Rules, measure_throughput

WATCHED_STEPS = 60  # of memory's request in a quick run


def measure_all(
    model: Model, sides: Sides, folder: Path, *, quick: bool, progress: Progress = silent
) -> Iterator[tuple[Path, Document]]:
    """Write a document of each verb into `folder` as soon as it is known, and yield it.

    Raises:
        SideError: our own side cannot be opened.
    """
    for verb, measure in planned(model, sides, quick=quick).items():

        def within(line: str, verb: str = verb) -> None:
            progress(f"{verb}: {line}")

        found = measure(progress=within)
        document = replace(found, model={**found.model, "name": model.name})
        path = folder / f"{verb}-{re.sub(r'[^a-z0-9]+', '-', model.name.lower()).strip('-')}.json"
        document.write(path)
        yield path, document


def planned(model: Model, sides: Sides, *, quick: bool) -> Mapping[str, Callable[..., Document]]:
    """How each verb measures the model's default case.

    `quick` measures the same, only fewer times and at fewer points: the demo model within two minutes on two
    cores.
    """
    package, task = model.package, sides.task
    case, pace = Case.of(package.manifest), Pace.quick() if quick else Pace()
    alone = replace(sides, references=())
    axes = {name: axis.values[: 3 if quick else None] for name, axis in AXES.items()}  # a line needs 3
    sweep = {"batches": (1, 4) if quick else (1, 2, 4, 8), "rules": Rules.quick() if quick else Rules()}
    inputs = Inputs(cases=(replace(case, steps=8),), samples=1 if quick else 3)
    return {
        "latency": partial(measure_latency, package, sides, [case], pace=pace),
        "memory": partial(measure_memory, package, alone, case, steps=WATCHED_STEPS if quick else STEPS),
        "throughput": partial(measure_throughput, package, task, case, **sweep, pace=pace),
        "scaling": partial(measure_scaling, package, task, case, axes=axes, pace=pace),
        "parity": partial(measure_parity, package, task, inputs),
        "cold-start": partial(measure_cold_start, package, task, repeats=QUICK_REPEATS if quick else REPEATS),
        "build": partial(measure_build, package, Builds()),
    }
