"""The search on a simulated clock: that it ends within its budget, and finds what queueing theory says."""

from dataclasses import replace

import numpy as np
import pytest

from latentrt.benchmarks.case import Case
from latentrt.benchmarks.records import Row
from latentrt.benchmarks.verbs.rate_search import VOUCHED, Limits
from latentrt.benchmarks.verbs.scenarios import expected_rate
from latentrt.benchmarks.verbs.throughput import HIGHEST, Rules, Scenarios

CASE = Case(width=64, height=64, guidance_scale=3.0, steps=1)


class SimulatedWorker:
    """Its own clock too. Takes `seconds` for a picture, with some noise, and now and then 3 s more."""

    def __init__(self, seconds: float, seed: int = 0, *, stalls: float = 0.0) -> None:
        self.time, self.seconds, self.stalls = 1000.0, seconds, stalls
        self.random = np.random.default_rng(seed)

    def now(self) -> float:
        return self.time

    def wait_until(self, moment: float) -> None:
        self.time = max(self.time, moment)

    def prepare(self, pictures: int) -> float:
        return self.seconds * pictures

    def serve(self, pictures: int) -> None:
        stalled = 3.0 if self.random.random() < self.stalls else 0.0
        self.time += self.seconds * pictures * float(self.random.normal(1, 0.03)) + stalled


def search(worker: SimulatedWorker, rules: Rules) -> tuple[Row, float]:
    """The row, and seconds from the end of Offline to the end of the search."""
    ended = worker.now()

    def said(line: str) -> None:
        nonlocal ended
        if not line.startswith(HIGHEST):
            ended = worker.now()

    bench = Scenarios(worker=worker, case=CASE, rules=rules, said=said, clock=worker)
    _, offline, row = bench.rows(1)
    return row, worker.now() - ended - offline.figures["seconds"]


@pytest.mark.parametrize("stalls", [0.0, 0.002])
def test_a_picture_of_the_demo_within_four_minutes(stalls: float) -> None:
    """0.31 s a picture: the median of many searches is what M/D/1 allows, whatever a single one's luck."""
    theory = expected_rate([0.31], 4 * 0.31)
    rates: list[float] = []
    for seed in range(12):
        worker = SimulatedWorker(0.31, seed, stalls=stalls)
        row, seconds = search(worker, Rules(seed=100 * seed))
        assert seconds <= 240
        assert row.status == "ok"
        if row.figures["met"]:
            rates.append(row.figures["rate"])
            assert row.figures["p99"] <= row.figures["deadline_s"]
            assert len(row.samples) >= 32
            assert 0.2 < row.figures["confidence"] < 0.99
    assert len(rates) >= 10
    assert np.median(rates) == pytest.approx(theory, rel=0.2)
    assert 0.5 * theory < min(rates) <= max(rates) < 1.4 * theory


def test_a_fast_worker_takes_as_many_queries_as_vouch_for_a_p99() -> None:
    row, seconds = search(SimulatedWorker(0.01), Rules())
    assert len(row.samples) == VOUCHED
    assert row.figures["late"] <= 6
    assert row.figures["early_stopping"]["s"] is not None
    assert seconds < 60
    assert row.figures["expected"] == pytest.approx(expected_rate([0.01], 0.04), rel=0.05)
    assert row.figures["runs"][0]["rate"] == pytest.approx(row.figures["expected"])


def test_a_slow_worker_needs_a_larger_budget() -> None:
    row, _ = search(SimulatedWorker(10.0), Rules())
    assert (row.status, row.samples) == ("not available", ())
    needed = float(row.reason.split("budget of ")[1].split()[0])
    limits = Limits(capacity=0.1, deadline=40.0, fewest=32, shortest=5.0, rounds=2, budget=240.0, seed=0)
    assert needed == pytest.approx(limits.needed, rel=0.02)
    row, seconds = search(SimulatedWorker(10.0), Rules(budget=1.05 * needed))
    assert row.status == "ok"
    assert row.figures["runs"]
    assert seconds <= 1.2 * needed, "of so few queries, arrivals may take longer than planned"


def test_queries_drawn_together_are_searched_for_up_to_what_offline_can_do() -> None:
    row, seconds = search(SimulatedWorker(0.05), replace(Rules(), together=2))
    assert row.figures["expected"] is None, "a queue that is served one by one says nothing of it"
    assert row.figures["runs"][0]["rate"] == pytest.approx(row.figures["capacity"] / 2)
    assert row.figures["met"]
    assert seconds <= 240
