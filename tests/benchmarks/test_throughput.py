"""Throughput with sides that take a known time, in real time; and once with the demo model."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from latentrt.benchmarks.case import Case
from latentrt.benchmarks.process import SideError
from latentrt.benchmarks.records import Document, Row
from latentrt.benchmarks.rounds import Pace
from latentrt.benchmarks.sides.contract import OURS, Task
from latentrt.benchmarks.verbs import throughput
from latentrt.benchmarks.verbs.throughput import SWEEP, Rules, measure_throughput
from latentrt.engines.package import Package
from latentrt.runtime.pipeline import SHIPPED
from tests.benchmarks.stand_in_side import StandInSide

PACKAGE = Package.open(SHIPPED["demo"])
TASK = Task(package=PACKAGE.root, threads=1)
CASE = Case(width=64, height=64, guidance_scale=3.0, steps=1)
FIXED, EACH = 0.004, 0.001  # seconds of a call, and of every picture in it
PACE = Pace(runs=3, budget=0.2, turn=0.01, least=2, warm_up=0)
RULES = Rules(queries=20, seconds=0.0, samples=10, budget=5.0)


class Slow(StandInSide):
    """Takes the time that it tells."""

    def time(self, runs: int, *, slot: str = "") -> tuple[tuple[float, ...], list[dict[str, Any]]]:
        time.sleep(self.slots[slot] * runs)
        return super().time(runs, slot=slot)


class NoMoreThanTwo(Slow):
    def prepare(self, workload: str, case: Case, *, slot: str = "") -> Any:
        if case.pictures > 2:
            raise SideError("FAILED", "out of memory")
        return super().prepare(workload, case, slot=slot)


class Broken(Slow):
    def time(self, runs: int, *, slot: str = "") -> Any:
        raise SideError("FAILED", "the output is not finite")


def measured(
    monkeypatch: pytest.MonkeyPatch, kind: Callable[..., StandInSide] = Slow, **changes: Any
) -> tuple[Document, list[str]]:
    def opened(name: str, module: str, task: Task) -> StandInSide:
        return kind(name, lambda workload, case: FIXED + EACH * case.pictures)

    monkeypatch.setattr(throughput, "SideProcess", opened)
    lines: list[str] = []
    arguments = {"batches": (1, 2, 4), "rules": RULES, "pace": PACE, "progress": lines.append, **changes}
    return measure_throughput(PACKAGE, TASK, CASE, **arguments), lines


def row(document: Document, workload: str) -> Row:
    (found,) = document.select(workload)
    return found


def test_sweep_and_scenarios(monkeypatch: pytest.MonkeyPatch) -> None:
    document, lines = measured(monkeypatch)
    sweep = list(document.select(SWEEP))
    assert [found.case["pictures"] for found in sweep] == [1, 2, 4]
    for found, batch in zip(sweep, (1, 2, 4), strict=True):
        assert found.figures["s_per_sample"] == pytest.approx((FIXED + EACH * batch) / batch)
        assert found.figures["samples_per_s"] == pytest.approx(batch / (FIXED + EACH * batch))
    single = row(document, "SingleStream")
    assert len(single.samples) == 20
    assert 0.005 <= single.figures["p50"] < 0.015
    offline = row(document, "Offline")
    assert (offline.figures["samples"], offline.figures["batch"]) == (10, 4)  # calls of 4, 4 and 2
    assert offline.figures["seconds"] >= 2 * 0.008 + 0.006
    assert offline.figures["samples_per_s"] == pytest.approx(10 / offline.figures["seconds"])
    assert "p99" not in offline.figures, "one query has no distribution"
    assert lines[0] == document.settings["submission"]
    assert "not a submission" in lines[0]
    assert document.settings["rules"]["queries"] == 20


def test_single_stream_lasts_as_long_as_it_should_and_the_budget_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rules = Rules(queries=1, seconds=0.1, samples=1, budget=5.0)
    single = row(measured(monkeypatch, rules=rules)[0], "SingleStream")
    assert sum(single.samples) >= 0.1
    assert single.figures["seconds"] < 0.3
    document = measured(monkeypatch, rules=Rules(queries=500, seconds=0.0, samples=400, budget=0.05))[0]
    assert len(row(document, "SingleStream").samples) < 100
    assert row(document, "Offline").figures["samples"] < 200


def test_what_does_not_fit_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    document = measured(monkeypatch, kind=NoMoreThanTwo)[0]
    status = [(found.status, found.reason) for found in document.select(SWEEP)]
    assert status == [("ok", ""), ("ok", ""), ("FAILED", "out of memory")]
    assert row(document, "Offline").figures["batch"] == 2
    document = measured(monkeypatch, kind=Broken)[0]
    for workload in ("SingleStream", "Offline"):
        found = row(document, workload)
        assert (found.status, found.reason) == ("FAILED", "the output is not finite")


def test_the_demo_model() -> None:
    rules = Rules(queries=4, seconds=0.0, samples=3, budget=3.0)
    document = measure_throughput(PACKAGE, TASK, CASE, batches=(1, 2), rules=rules, pace=PACE)
    assert [(found.side, found.status) for found in document.rows] == [(OURS, "ok")] * 4
    single = row(document, "SingleStream")
    sweep = next(document.select(SWEEP))
    assert min(single.samples) > 0.5 * min(sweep.samples), "queries draw pictures"
