"""The load test of the server: rows of made-up costs, and once of the demo model, with their tables."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from latentrt.benchmarks import words
from latentrt.benchmarks.load.costs import Cost, MadeUpClock, gpu_like, simulated
from latentrt.benchmarks.load.open_loop import Finished, Played
from latentrt.benchmarks.load.traffic import Request, mix_of
from latentrt.benchmarks.records import Document, Row, read_document
from latentrt.benchmarks.report.reading import Result
from latentrt.benchmarks.report.tables import full_tables
from latentrt.benchmarks.sides.contract import OURS
from latentrt.benchmarks.verbs.serve import (
    ALONE,
    BATCHED,
    MIXED,
    ONE_BY_ONE,
    SIMULATED,
    LoadRules,
    figures_of,
    loaded,
    measure_serve,
    simulation,
)
from latentrt.engines.errors import BackendError
from tests.benchmarks.stand_in_side import CASE, PACKAGE, TASK
from tests.benchmarks.test_load import OTHER, PLAIN

KINDS = mix_of(replace(CASE, width=128, height=128, steps=20), PACKAGE.manifest)
RULES = LoadRules(rounds=2, requests=30, warm_up=5)
SIDES = (ONE_BY_ONE, BATCHED, OURS)


def rows_of(rules: LoadRules = RULES, counted: int = 30, rounds: int = 2, **changes: Any) -> list[Row]:
    ground = simulation(gpu_like(KINDS[0].pixels), KINDS, {"steps": 20}, rows=8)
    return list(loaded(replace(ground, **changes), rules, counted, rounds))


# ── rows ───────────────────────────────────────────────────────────────────────────────────────────


def test_every_way_has_a_row_at_every_load_of_as_many_requests() -> None:
    rows = rows_of()
    assert [(row.case["load"], row.side) for row in rows] == [
        (load, side) for load in (0.6, 0.9, 1.2) for side in SIDES
    ]
    for row in rows:
        assert (row.status, row.workload, row.case["steps"]) == ("ok", SIMULATED, 20)
        assert len(row.rounds) == 2
        refused = row.figures["refused"] * 60
        assert len(row.samples) == pytest.approx(60 - refused)
        assert refused == 0 or row.case["load"] > 1, "below capacity nothing is refused"
    assert rows[0].rounds[0] != rows[0].rounds[1], "each round has its own arrivals"
    assert rows[0].figures["cost"]["fixed"] == 7.8e-3


def test_ways_take_turns_on_the_same_arrivals() -> None:
    lines: list[str] = []
    ground = simulation(gpu_like(KINDS[0].pixels), KINDS, {}, rows=8)
    rules = replace(RULES, loads=(0.6, 1.2))
    rows = list(loaded(ground, rules, 30, 2, lines.append))
    turns = [(line.partition("load ")[2].partition(",")[0], line.split(", ")[-2]) for line in lines]
    sides = [side.split(", ")[-1] for side in SIDES]
    assert turns == [("0.6", side) for side in sides] + [("1.2", side) for side in sides] + [
        ("0.6", side) for side in reversed(sides)
    ] + [("1.2", side) for side in reversed(sides)]
    assert len({row.figures["offered_per_s"] for row in rows}) == 2
    alone = sum(kind.share * gpu_like(KINDS[0].pixels).alone(kind) for kind in KINDS)
    assert rows[0].figures["offered_per_s"] == pytest.approx(0.6 / alone)


def test_the_ways_differ_on_a_device_that_has_room() -> None:
    """Not by how much: that mixed requests gain by equal batches, and more by shared steps."""
    one, batched, ours = rows_of(replace(RULES, loads=(0.9,)), counted=300, rounds=1)
    assert ours.summary["p99"] < batched.summary["p99"] < one.summary["p99"]
    assert ours.figures["mean_rows"] > batched.figures["mean_rows"] > one.figures["mean_rows"]
    assert ours.figures["in_time_per_s"] > one.figures["in_time_per_s"]


def test_one_at_a_time_draws_its_capacity_where_more_is_asked_and_refuses_the_rest() -> None:
    kinds = mix_of(replace(CASE, width=128, height=128, steps=2), PACKAGE.manifest)
    ground = simulation(gpu_like(kinds[0].pixels), kinds, {}, rows=8)
    one, _, ours = loaded(ground, replace(RULES, loads=(1.5,)), 4000, 1)
    assert one.figures["requests_per_s"] == pytest.approx(ground.per_s, rel=0.03)
    assert one.figures["refused"] == pytest.approx(1 / 3, abs=0.02)
    assert one.figures["in_time_per_s"] < one.figures["requests_per_s"]
    assert ours.figures["refused"] < one.figures["refused"], "its capacity is larger"


def test_shared_steps_draw_as_much_however_much_more_is_asked() -> None:
    """Goodput beyond capacity is flat, and what is not drawn was refused."""
    kinds = mix_of(replace(CASE, width=128, height=128, steps=2), PACKAGE.manifest)
    ground = simulation(gpu_like(kinds[0].pixels), kinds, {}, rows=8)
    rows = list(loaded(ground, replace(RULES, loads=(1.5, 2.0, 4.0)), 4000, 1))
    ours = [row for row in rows if row.side == SIDES[-1]]
    drawn = [row.figures["requests_per_s"] for row in ours]
    assert min(drawn) > 0.9 * max(drawn)
    assert min(drawn) > ground.per_s, "more than one at a time"
    for row in ours:
        taken = row.figures["offered_per_s"] * (1 - row.figures["refused"])
        assert row.figures["requests_per_s"] == pytest.approx(taken, rel=0.02)


def test_a_way_that_fails_has_no_time_and_the_others_have() -> None:
    clock = MadeUpClock()
    good = simulated(gpu_like(KINDS[0].pixels), clock)

    def start(requests: Sequence[Request]) -> Generator[Any, None, Any]:
        if len(requests) > 1:
            raise BackendError("no memory for a batch", expected="memory", fix="Draw less.")
        return good(requests)

    rows = rows_of(start=start, clock=clock)
    assert {row.side for row in rows if row.status == "FAILED"} == {BATCHED}
    assert {row.reason for row in rows if row.side == BATCHED} == {"no memory for a batch"}
    assert all(row.rounds for row in rows if row.side != BATCHED)
    assert not any(row.rounds for row in rows if row.side == BATCHED)


def test_a_round_in_which_everything_was_refused_is_no_measurement() -> None:
    rules = replace(RULES, loads=(1000.0,), warm_up=1, jobs=1)
    row = rows_of(rules, counted=2, rounds=1)[0]
    assert (row.status, row.reason) == ("FAILED", "every request of a round was refused")


def test_figures_are_of_the_time_between_the_counted_arrivals() -> None:
    requests = [
        Request(number=number, kind=PLAIN if number != 3 else OTHER, due=10.0 * number) for number in range(6)
    ]
    finished = [
        Finished(request=requests[n], at=at) for n, at in ((0, 9), (1, 15), (2, 32), (3, 39), (5, 70))
    ]
    run = Played(
        counted=tuple(requests[1:5]),
        finished=tuple(finished),
        refused=(requests[4],),
        calls=((9.0, 2), (11.0, 4), (20.0, 4), (40.0, 1), (41.0, 8)),
    )
    found = figures_of([run], {PLAIN: 10.0, OTHER: 9.0})
    assert found == {
        "requests_per_s": 3 / 30,
        "in_time_per_s": 2 / 30,
        "refused": 1 / 4,
        "unet_calls": 3,
        "mean_rows": 3.0,
    }, "the second took 12 s, the third as long as it may"
    assert figures_of([replace(run, calls=())], {PLAIN: 10.0, OTHER: 9.0})["mean_rows"] is None


# ── a document ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def document() -> Document:
    """A few seconds of the demo model: small pictures of two steps."""
    rules = LoadRules(
        loads=(0.5, 3.0), rounds=1, requests=8, warm_up=1, jobs=4, rows=4, alone=1, simulated=30
    )
    return measure_serve(PACKAGE, TASK, CASE, rules=rules)


def test_the_demo_model_under_load(document: Document, tmp_path: Path) -> None:
    assert [row.status for row in document.rows] == ["ok"] * len(document.rows)
    assert len(list(document.select(ALONE))) == 6
    measured = list(document.select(MIXED))
    assert len(measured) == 6
    assert document.settings["rows"] == 4
    fastest = min(sample for row in document.select(ALONE) for sample in row.samples)
    for row in measured:
        assert min(row.samples) > fastest / 4, "pictures are drawn"
        assert row.stamp["cpu"]
        assert row.figures["unet_calls"] > 0
    assert {row.case["cost"] for row in document.select(SIMULATED)} == {
        "this machine, measured",
        "GPU-like, assumed",
    }
    document.write(tmp_path / "serve.json")
    again = read_document(tmp_path / "serve.json")
    assert [row.side for row in again.rows] == [row.side for row in document.rows]
    assert len(words.lines(again)) == 1 + len(document.rows)


def test_rows_are_measured_where_nobody_says_how_many() -> None:
    rules = LoadRules(loads=(0.5,), rounds=1, requests=2, warm_up=0, alone=1, simulated=2)
    found = measure_serve(PACKAGE, TASK, CASE, rules=rules)
    assert found.settings["rows"] in (1, 2, 4, 8, 16)


def test_the_tables_say_what_was_measured_and_what_was_not(document: Document) -> None:
    text = full_tables([Result(name="serve", digest="0" * 64, document=document)], {})
    lines = text.splitlines()
    assert sum(line.startswith("| load, way to draw |") for line in lines) == 1
    assert (
        sum(line.startswith("| simulation (GPU-like, assumed): load, way to draw |") for line in lines) == 1
    )
    assert "a call of the UNet with b rows takes 7.8 + 5.2 b ms" in text
    row = next(document.select(MIXED, OURS, {**next(document.select(MIXED)).case, "load": 3.0}))
    cells = next(line for line in lines if line.startswith("| 3, shared steps")).split(" | ")
    assert cells[1:3] == [words.seconds(row.summary["p50"]), words.seconds(row.summary["p99"])]
    assert cells[5] == words.percent(row.figures["refused"])
    (short,) = (line for line in lines if line.startswith("| mixed requests at load 0.5, latency p50 [p99]"))
    assert all(way in short for way in ("one at a time", "equal requests as one batch", "shared steps"))


def test_what_failed_is_told_under_the_tables(document: Document) -> None:
    rows = tuple(
        replace(row, rounds=(), status="FAILED", reason="no memory") if row.workload == MIXED else row
        for row in document.rows
    )
    failed = Result(name="serve", digest="0" * 64, document=replace(document, rows=rows))
    text = full_tables([failed], {})
    assert "FAILED: no memory" in text
    assert "| load, way to draw |" not in text
    assert "mixed requests at load" not in text


def test_the_cost_of_this_machine_is_in_its_rows(document: Document) -> None:
    row = next(document.select(SIMULATED))
    cost = Cost(**row.figures["cost"])
    assert cost.each > 0
    assert cost.decode > 0
    assert cost.pixels == CASE.width * CASE.height
