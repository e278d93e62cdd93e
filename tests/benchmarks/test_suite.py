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


def options(monkeypatch: pytest.MonkeyPatch, verb: str, *, quick: bool) -> dict[str, Any]:
    """The keywords that the verb's function is called with."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(suite, f"measure_{verb}", lambda *positional, **named: found.update(named))
    planned(MODEL, SIDES, quick=quick)[verb](progress=silent)
    return found


def test_quick_measures_less_of_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(verb: str, name: str) -> tuple[Any, Any]:
        quick, full = (options(monkeypatch, verb, quick=quick)[name] for quick in (True, False))
        return quick, full

    axes, all_axes = both("scaling", "axes")
    assert set(axes) == set(all_axes) == set(AXES)
    for name, values in all_axes.items():
        assert values == AXES[name].values
        assert axes[name] == values[:3], "the fewest that a line has a residual with"
    watched, all_watched = both("memory", "steps")
    assert watched < all_watched
    assert watched - SETTLED >= 2 * BLOCKS, "what comes and goes with every other step is no growth"
    assert both("throughput", "batches") == ((1, 4), (1, 2, 4, 8))
    pace, all_pace = both("latency", "pace")
    assert pace.budget < all_pace.budget
