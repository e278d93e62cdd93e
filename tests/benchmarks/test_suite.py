"""`latentrt bench all`: a quick run measures less of the same."""

from typing import Any

import pytest

from latentrt.benchmarks.models.open import Model
from latentrt.benchmarks.sides.contract import Task
from latentrt.benchmarks.sides.watched import BLOCKS, SETTLED
from latentrt.benchmarks.verbs import suite
from latentrt.benchmarks.verbs.latency import Sides, silent
from latentrt.benchmarks.verbs.scaling import AXES
from latentrt.benchmarks.verbs.suite import planned
from latentrt.engines.package import Package
from latentrt.runtime.pipeline import SHIPPED

PACKAGE = Package.open(SHIPPED["demo"])
MODEL = Model(name="demo", package=PACKAGE, checkpoint=None)
SIDES = Sides(task=Task(package=PACKAGE.root))


def test_quick_measures_less_of_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, list[dict[str, Any]]] = {}  # the keywords of each verb's function: quick, and in full
    for verb in ("scaling", "memory", "throughput", "latency"):
        calls = found.setdefault(verb, [])
        monkeypatch.setattr(
            suite, f"measure_{verb}", lambda *positional, calls=calls, **named: calls.append(named)
        )
        for quick in (True, False):
            planned(MODEL, SIDES, quick=quick)[verb](silent)
    axes, all_axes = (call["axes"] for call in found["scaling"])
    assert all_axes == {name: axis.values for name, axis in AXES.items()}
    assert axes == {name: values[:3] for name, values in all_axes.items()}, "as few as a residual needs"
    watched, all_watched = (call["steps"] for call in found["memory"])
    assert watched < all_watched
    assert watched - SETTLED >= 2 * BLOCKS, "what comes and goes with every other step is no growth"
    assert [call["batches"] for call in found["throughput"]] == [(1, 4), (1, 2, 4, 8)]
    pace, all_pace = (call["pace"] for call in found["latency"])
    assert pace.budget < all_pace.budget
