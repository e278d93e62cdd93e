"""Throughput with sides that take a known time, in real time; and once with the demo model."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from latentrt.benchmarks.case import Case
from latentrt.benchmarks.process import SideError
from latentrt.benchmarks.records import Document, Row
from latentrt.benchmarks.rounds import Pace
from latentrt.benchmarks.sides.contract import OURS, Task
from latentrt.benchmarks.verbs import throughput
from latentrt.benchmarks.verbs.throughput import (
    HIGHEST,
    SWEEP,
    Rules,
    Scenarios,
    best_batch,
    measure_throughput,
)
from latentrt.engines.package import Package
from latentrt.runtime.pipeline import SHIPPED
from tests.benchmarks.stand_in_side import StandInSide

PACKAGE = Package.open(SHIPPED["demo"])
TASK = Task(package=PACKAGE.root, threads=1)
CASE = Case(width=64, height=64, guidance_scale=3.0, steps=1)
FIXED, EACH = 0.004, 0.001  # seconds of a call, and of every picture in it
PACE = Pace(runs=3, budget=0.2, turn=0.01, least=2, warm_up=0)
RULES = Rules(queries=20, seconds=0.0, samples=10, rounds=0, budget=5.0)
SEARCH = {**vars(RULES), "rounds": 2, "budget": 1.5}


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


def measured(
    monkeypatch: pytest.MonkeyPatch, kind: Callable[..., StandInSide] = Slow, **changes: Any
) -> tuple[Document, list[str]]:
    def opened(name: str, module: str, task: Task) -> StandInSide:
        return kind(name, lambda workload, case: FIXED + EACH * case.pictures)

    monkeypatch.setattr(throughput, "SideProcess", opened)
    said: list[str] = []
    arguments = {"batches": (1, 2, 4), "rules": RULES, "pace": PACE, "said": said.append, **changes}
    return measure_throughput(PACKAGE, TASK, CASE, **arguments), said


def row(document: Document, workload: str) -> Row:
    (found,) = document.select(workload)
    return found


def test_sweep_and_scenarios(monkeypatch: pytest.MonkeyPatch) -> None:
    document, said = measured(monkeypatch)
    sweep = list(document.select(SWEEP))
    assert [found.case["pictures"] for found in sweep] == [1, 2, 4]
    for found, batch in zip(sweep, (1, 2, 4), strict=True):
        assert found.figures["s_per_sample"] == pytest.approx((FIXED + EACH * batch) / batch)
        assert found.figures["samples_per_s"] == pytest.approx(batch / (FIXED + EACH * batch))
    single = row(document, "SingleStream")
    assert len(single.samples) == 20
    assert 0.005 <= single.figures["p50"] < 0.015
    assert single.figures["early_stopping"] == {"percentile": 90, "s": None}, "20 queries vouch for nothing"
    offline = row(document, "Offline")
    assert (offline.figures["samples"], offline.figures["batch"]) == (10, 4)  # calls of 4, 4 and 2
    assert offline.figures["seconds"] >= 2 * 0.008 + 0.006
    assert "p99" not in offline.figures, "one query has no distribution"
    assert not list(document.select(HIGHEST)), "not asked for"
    assert said[0] == document.settings["submission"]
    assert "not a submission" in said[0]
    assert document.settings["rules"]["queries"] == 20


def test_server_counts_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """At ten times what the worker can do, the last of 20 queries waits for nearly all of the others."""
    found = row(measured(monkeypatch, rules=Rules(**{**vars(RULES), "rate": 1000.0}))[0], "Server")
    assert found.samples[-1] > 15 * (FIXED + EACH)
    assert found.samples[0] < found.samples[10] < found.samples[-1], "in the order of arrival"
    assert found.figures["met"] is False
    assert found.figures["rate"] == 1000.0
    assert found.figures["late"] >= 15
    assert found.figures["waited_mean_s"] > 5 * (FIXED + EACH)
    assert found.figures["samples_per_s"] <= 1 / (FIXED + EACH) < found.figures["scheduled_per_s"]


def test_a_quick_look_runs_at_a_share_of_the_rate_in_place_of_a_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rules = Rules(**{**vars(Rules.quick()), "seconds": 0.0})
    document = measured(monkeypatch, rules=rules)[0]
    found, single = row(document, "Server"), row(document, "SingleStream")
    assert found.figures["rate"] == pytest.approx(single.figures["samples_per_s"] / 2)
    assert len(found.samples) == rules.queries
    assert found.figures["p99"] >= FIXED + EACH
    assert not list(document.select(HIGHEST))
    asked = row(measured(monkeypatch, rules=Rules(**{**vars(rules), "rate": 70.0}))[0], "Server")
    assert asked.figures["rate"] == 70.0, "a rate that was asked for goes first"


def test_a_rate_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    found = row(measured(monkeypatch, rules=Rules(**{**vars(RULES), "rate": 2.0}))[0], "Server")
    assert (found.status, found.reason) == ("not available", "20 queries arrive in 10 s: more than 5 s")


def test_server_may_draw_queries_together(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = Rules(**{**vars(RULES), "rate": 1000.0, "together": 4})
    found = row(measured(monkeypatch, rules=rules)[0], "Server")
    assert found.figures["batch_mean"] > 2
    assert found.figures["samples_per_s"] > 1 / (FIXED + EACH)


def test_highest_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    found = row(measured(monkeypatch, rules=Rules(**{**SEARCH, "deadline": 0.2}))[0], HIGHEST)
    assert (found.status, found.figures["met"]) == ("ok", True)
    assert 0 < found.figures["rate"] <= found.figures["capacity"] <= 1 / (FIXED + EACH)
    assert found.figures["p99"] <= 0.2
    assert len(found.samples) >= RULES.queries // 2
    assert found.figures["runs"][-1]["rate"] == found.figures["rate"]
    assert sum(run["seconds"] for run in found.figures["runs"]) < 2.0, "the budget"


def test_no_rate_keeps_an_impossible_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    found = row(measured(monkeypatch, rules=Rules(**{**SEARCH, "deadline": 0.001}))[0], HIGHEST)
    assert (found.status, found.samples, found.figures["met"]) == ("ok", (), False)
    assert "no rate down to" in found.reason
    assert not any(run["met"] for run in found.figures["runs"])
    assert max(run["samples"] for run in found.figures["runs"]) == 1, "a run that has failed ends"


def test_a_budget_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    document = measured(monkeypatch, rules=Rules(queries=500, seconds=0.0, samples=400, budget=0.05))[0]
    assert len(row(document, "SingleStream").samples) < 100
    assert row(document, "Offline").figures["samples"] < 200
    assert row(document, HIGHEST).status == "not available"
    assert "it needs a budget of" in row(document, HIGHEST).reason


def test_a_batch_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    document = measured(monkeypatch, kind=NoMoreThanTwo)[0]
    status = [(found.status, found.reason) for found in document.select(SWEEP)]
    assert status == [("ok", ""), ("ok", ""), ("FAILED", "out of memory")]
    assert row(document, "Offline").figures["batch"] == 2
    rules = Rules(**{**vars(RULES), "rate": 10.0, "together": 4})
    assert row(measured(monkeypatch, kind=NoMoreThanTwo, rules=rules)[0], "Server").status == "FAILED"


@dataclass
class Broken:
    """A worker that fails at its first query."""

    asked: list[int] = field(default_factory=list[int])

    def prepare(self, pictures: int) -> float:
        return 0.01

    def serve(self, pictures: int) -> None:
        self.asked.append(pictures)
        raise SideError("FAILED", "the output is not finite")


def test_a_worker_that_fails() -> None:
    rows = Scenarios(worker=Broken(), case=CASE, rules=RULES, said=lambda line: None).rows(1)
    assert [(found.workload, found.status) for found in rows] == [
        ("SingleStream", "FAILED"),
        ("Offline", "FAILED"),
    ]
    assert rows[0].reason == "the output is not finite"
    assert best_batch(rows) == 1


def test_the_demo_model() -> None:
    rules = Rules(queries=4, seconds=0.0, samples=3, budget=3.0)
    document = measure_throughput(PACKAGE, TASK, CASE, batches=(1, 2), rules=rules, pace=PACE)
    assert [(found.side, found.status) for found in document.rows] == [(OURS, "ok")] * 5
    single = row(document, "SingleStream")
    sweep = next(document.select(SWEEP))
    assert min(single.samples) > 0.5 * min(sweep.samples), "queries draw pictures"
