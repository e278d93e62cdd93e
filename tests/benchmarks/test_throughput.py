"""Scaling and throughput with sides that take a known time; and once with the demo model."""

import time
from functools import partial
from typing import Any

import pytest

from latentrt.benchmarks.case import Case
from latentrt.benchmarks.process import SideError
from latentrt.benchmarks.records import Document
from latentrt.benchmarks.rounds import Pace
from latentrt.benchmarks.sides.contract import OURS, Task
from latentrt.benchmarks.verbs import scaling, throughput
from latentrt.benchmarks.verbs.scaling import AXES, measure_scaling
from latentrt.benchmarks.verbs.throughput import SWEEP, Rules, measure_throughput
from tests.benchmarks.stand_in_side import CASE, PACKAGE, TASK, StandInSide, row_of

FIXED, EACH = 0.004, 0.001  # seconds of a call, and of every picture in it
PACE = Pace(runs=3, budget=0.2, turn=0.01, least=2, warm_up=0)
RULES = Rules(queries=20, seconds=0.0, samples=10, budget=5.0)


class Slow(StandInSide):
    """Takes the time that it tells."""

    def time(self, runs: int, *, slot: str = "", beside: str | None = None) -> Any:
        time.sleep(self.slots[slot] * runs)
        return super().time(runs, slot=slot, beside=beside)


class Broken(Slow):
    def time(self, runs: int, *, slot: str = "", beside: str | None = None) -> Any:
        raise SideError("FAILED", "the output is not finite")


def measured(monkeypatch: pytest.MonkeyPatch, kind: Any = Slow, **changes: Any) -> tuple[Document, list[str]]:
    def opened(name: str, module: str, task: Task) -> StandInSide:
        return kind(name, lambda workload, case: FIXED + EACH * case.pictures)

    monkeypatch.setattr(throughput, "SideProcess", opened)
    lines: list[str] = []
    arguments = {"batches": (1, 2, 4), "rules": RULES, "pace": PACE, "progress": lines.append, **changes}
    return measure_throughput(PACKAGE, TASK, CASE, **arguments), lines


def test_sweep_and_scenarios(monkeypatch: pytest.MonkeyPatch) -> None:
    document, lines = measured(monkeypatch)
    sweep = list(document.select(SWEEP))
    assert [found.case["pictures"] for found in sweep] == [1, 2, 4]
    for found, batch in zip(sweep, (1, 2, 4), strict=True):
        assert found.figures["samples_per_s"] == pytest.approx(batch / (FIXED + EACH * batch))
    single = row_of(document, "SingleStream")
    assert len(single.samples) == 20
    assert 0.005 <= single.summary["p50"] < 0.015
    offline = row_of(document, "Offline")
    assert (offline.figures["samples"], offline.case["pictures"]) == (8, 4), "of 10, whole calls"
    (seconds,) = offline.samples
    assert seconds >= 2 * 0.008
    assert offline.figures["samples_per_s"] == pytest.approx(8 / seconds)
    assert lines[0] == document.settings["submission"]
    assert "not a submission" in lines[0]
    assert document.settings["rules"]["queries"] == 20


def test_single_stream_lasts_as_long_as_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = Rules(queries=1, seconds=0.1, samples=1, budget=5.0)
    single = row_of(measured(monkeypatch, rules=rules)[0], "SingleStream")
    assert 0.1 <= sum(single.samples) < 0.3
    document = measured(monkeypatch, rules=Rules(queries=500, seconds=0.0, samples=400, budget=0.05))[0]
    assert len(row_of(document, "SingleStream").samples) < 100
    assert row_of(document, "Offline").figures["samples"] < 200


def test_what_does_not_fit_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    document = measured(monkeypatch, kind=partial(Slow, most=2))[0]
    status = [(found.status, found.reason) for found in document.select(SWEEP)]
    assert status == [("ok", ""), ("ok", ""), ("FAILED", "out of memory")]
    assert row_of(document, "Offline").case["pictures"] == 2
    document = measured(monkeypatch, kind=Broken)[0]
    for workload in ("SingleStream", "Offline"):
        found = row_of(document, workload)
        assert (found.status, found.reason) == ("FAILED", "the output is not finite")


def test_the_demo_model() -> None:
    rules = Rules(queries=4, seconds=0.0, samples=3, budget=3.0)
    document = measure_throughput(PACKAGE, TASK, CASE, batches=(1, 2), rules=rules, pace=PACE)
    assert [(found.side, found.status) for found in document.rows] == [(OURS, "ok")] * 4
    single = row_of(document, "SingleStream")
    sweep = next(document.select(SWEEP))
    assert min(single.samples) > 0.5 * min(sweep.samples), "queries draw pictures"


WIDE = Case(width=128, height=192, guidance_scale=3.0)


def _cost(workload: str, case: Case) -> float:
    """Linear in steps (3 ms each, 5 ms besides) and in pictures; quadratic in pixels."""
    if workload == "picture":
        return 0.005 + 0.003 * case.steps
    return 1e-3 * case.pictures * (case.width * case.height / 24576) ** 2


def _measured(monkeypatch: pytest.MonkeyPatch, axes: Any) -> tuple[Document, dict[str, Any]]:
    monkeypatch.setattr(scaling, "SideProcess", lambda name, module, task: StandInSide(name, _cost, most=6))
    document = measure_scaling(PACKAGE, TASK, WIDE, axes=axes, pace=PACE)
    return document, {row.figures["of"]: row for row in document.select("fit")}


def test_the_line_is_the_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    document, rows = _measured(monkeypatch, {name: axis.values for name, axis in AXES.items()})
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
