from typing import Any

import pytest

from latentrt.benchmarks.models.open import Model
from latentrt.benchmarks.sides.contract import Task
from latentrt.benchmarks.verbs import suite
from latentrt.benchmarks.verbs.latency import Sides
from latentrt.benchmarks.verbs.memory_timeline import BLOCKS, SETTLED
from latentrt.benchmarks.verbs.scaling import AXES
from latentrt.benchmarks.verbs.suite import VERBS, Effort
from latentrt.engines.package import Package
from latentrt.runtime.pipeline import SHIPPED

PACKAGE = Package.open(SHIPPED["demo"])
MODEL = Model(name="demo", package=PACKAGE, checkpoint=None)
SIDES = Sides(task=Task(package=PACKAGE.root))


def asked(monkeypatch: pytest.MonkeyPatch, verb: str, effort: Effort) -> dict[str, Any]:
    """The keywords that the verb's function is called with."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(suite, f"measure_{verb}", lambda *positional, **named: found.update(named))
    VERBS[verb](MODEL, SIDES, effort, lambda line: None)
    return found


def test_quick_measures_less_of_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    quick, full = Effort.quick(), Effort.full()
    axes = asked(monkeypatch, "scaling", quick)["axes"]
    assert set(axes) == set(AXES)
    for name, values in asked(monkeypatch, "scaling", full)["axes"].items():
        assert values == AXES[name].values
        assert axes[name] == values[:3], "the fewest that a line has a residual with"
    watched = asked(monkeypatch, "memory", quick)["steps"]
    assert watched < asked(monkeypatch, "memory", full)["steps"]
    assert watched[0] - SETTLED >= 2 * BLOCKS, "what comes and goes with every other step is no growth"
    assert asked(monkeypatch, "throughput", quick)["batches"] == (1, 4)
    assert asked(monkeypatch, "throughput", full)["batches"] == (1, 2, 4, 8)
    assert (
        asked(monkeypatch, "latency", quick)["pace"].budget
        < asked(monkeypatch, "latency", full)["pace"].budget
    )


def test_quick_has_a_row_of_server_all_the_same() -> None:
    rules = Effort.quick().rules
    assert (rules.rounds, rules.share) == (0, 0.5)
    assert Effort.full().rules.rounds > 0
