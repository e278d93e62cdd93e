from typing import Any

import pytest

from latentrt.benchmarks.case import Case
from latentrt.benchmarks.process import SideError
from latentrt.benchmarks.records import Document
from latentrt.benchmarks.rounds import Pace
from latentrt.benchmarks.sides.contract import OURS, Task
from latentrt.benchmarks.verbs import scaling
from latentrt.benchmarks.verbs.scaling import AXES, measure_scaling
from latentrt.engines.package import Package
from latentrt.runtime.pipeline import SHIPPED
from tests.benchmarks.stand_in_side import StandInSide

PACKAGE = Package.open(SHIPPED["demo"])
TASK = Task(package=PACKAGE.root, threads=1)
CASE = Case(width=128, height=192, guidance_scale=3.0)
PACE = Pace(runs=2, rounds=2, budget=0.2, turn=0.01, least=2, warm_up=1)


def _cost(workload: str, case: Case) -> float:
    """Linear in steps (3 ms each, 5 ms besides) and in pictures; quadratic in pixels."""
    if workload == "picture":
        return 0.005 + 0.003 * case.steps
    return 1e-3 * case.pictures * (case.width * case.height / 24576) ** 2


class Small(StandInSide):
    """Has memory for six pictures."""

    def prepare(self, workload: str, case: Case, *, slot: str = "") -> Any:
        if case.pictures > 6:
            raise SideError("FAILED", "out of memory")
        return super().prepare(workload, case, slot=slot)


def _measured(monkeypatch: pytest.MonkeyPatch, axes: Any = None) -> tuple[Document, dict[str, Any]]:
    monkeypatch.setattr(scaling, "SideProcess", lambda name, module, task: Small(name, _cost))
    document = measure_scaling(PACKAGE, TASK, CASE, axes=axes, pace=PACE)
    return document, {row.figures["of"]: row for row in document.select("fit")}


def test_the_line_is_the_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    document, rows = _measured(monkeypatch)
    assert set(rows) == set(AXES)
    steps, batch, pixels = (rows[name].figures for name in ("steps", "batch", "pixels"))
    assert steps["slope"] == pytest.approx(0.003)
    assert steps["intercept"] == pytest.approx(0.005)
    assert steps["residual"] == pytest.approx(0, abs=1e-9)
    assert pixels["residual"] > 0.05, "a parabola is no line"
    assert [x for x, _ in pixels["points"]] == [64 * 128, 128 * 192, 192 * 256, 256 * 384]
    assert batch["points"] == [(n, pytest.approx(1e-3 * n)) for n in (1, 2, 4)]
    failed = [(row.case["pictures"], row.reason) for row in document.rows if row.status == "FAILED"]
    assert failed == [(8, "out of memory")], "a point that cannot be run leaves the others"


def test_two_points_are_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    row = _measured(monkeypatch, {"steps": (1, 2)})[1]["steps"]
    assert (row.status, row.reason) == ("FAILED", "2 points, a line with a residual needs 3")


def test_the_demo_model_for_real() -> None:
    case = Case(width=64, height=64, guidance_scale=3.0)
    document = measure_scaling(PACKAGE, TASK, case, axes={"steps": (1, 8, 16)}, pace=PACE)
    *points, fit = document.rows
    assert [row.case["steps"] for row in points] == [1, 8, 16]
    assert fit.side == OURS
    assert fit.figures["slope"] > 0
