"""`compare`, on documents of a machine that drifts, with noise that only ever slows down."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from latentrt.benchmarks.records import Document, Rounds, Row
from latentrt.benchmarks.sides.contract import AGAIN, OURS, YARDSTICK
from latentrt.benchmarks.verbs.compare import Comparison, compare
from latentrt.engines.errors import UsageError

DATE = "2026-11-22T03:04:05+00:00"
MACHINE = {"cpu": "a processor", "cores": 2, "gpu": None, "commit": "0123abc"}
EMPTY = Document(
    benchmark="latency", model={"name": "demo"}, settings={"threads": 2}, rows=(), date=DATE, machine=MACHINE
)
CASE = {"width": 64, "height": 64, "steps": 20}
SECONDS = {"unet": 0.013, "vae_decoder": 0.019}
FLAT: Rounds = ((1.0,), (1.0,), (1.0,))
UNSURE: Rounds = ((0.8,), (1.15,), (1.2,))


def simulated(seed: int, *, times: float = 1.0, machine: float = 1.0, beside: bool = True) -> Document:
    """A latency document: ours and ours again take `times` as long, on a machine `machine` times as slow.

    Within its 60 rounds the machine gets slower by up to half and faster again; every fifth run is hit by
    something else that runs. Each process has half a percent of its own. `beside`: whether ours ran
    beside the yardstick as well, as short ones do.
    """
    random, shape = np.random.default_rng(seed), (60, 4)
    rows: list[Row] = []
    for workload, seconds in SECONDS.items():
        drift = machine * (1.25 + 0.25 * np.sin(random.uniform(0, 6) + np.linspace(0, 6, 60)))[:, None]
        for side in (OURS, AGAIN):
            for unit, slow in (("s", drift), ("1", np.ones_like(drift))):
                spikes = np.where(random.random(shape) < 0.2, random.exponential(0.5, shape), 0)
                found = seconds * times * random.normal(1, 0.005) * slow * (1 + spikes)
                found *= random.lognormal(0, 0.04, shape)
                turns = tuple(map(tuple, found.tolist()))
                facts = {"yardstick_p50_s": float(np.median(drift))} if unit == "1" else {}
                who = YARDSTICK if unit == "1" else side
                rows.append(
                    Row(side=who, workload=workload, case=CASE, unit=unit, rounds=turns, figures=facts)
                )
    return document([row for row in rows if beside or row.side != YARDSTICK])


def document(rows: Sequence[Row], **changes: Any) -> Document:
    return replace(EMPTY, rows=tuple(rows), **changes)


def change(found: Document, workload: str, side: str, **changes: Any) -> Document:
    (chosen,) = found.select(workload, side)
    return replace(found, rows=tuple(replace(row, **changes) if row is chosen else row for row in found.rows))


def verdicts(found: Comparison) -> dict[str, str]:
    return {f"{row.side}, {row.workload}": row.verdict for row in found.rows}


# ── what it is for ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("times", "verdict"), [(1.1, "slower"), (1.0, "same"), (1 / 1.1, "faster")])
def test_a_planted_change_is_found_10_times_of_10(times: float, verdict: str) -> None:
    """The second machine is from half as fast to twice as fast; of nothing planted nothing is found."""
    for seed, machine in enumerate(2 ** np.linspace(-1, 1, 10)):
        found = compare(simulated(2 * seed), simulated(2 * seed + 1, times=times, machine=machine))
        assert found.regressed == (verdict == "slower")
        assert verdicts(found) == {"latentrt, unet": verdict, "latentrt, vae_decoder": verdict}
        for row in found.rows:
            assert row.machine == pytest.approx(machine, rel=0.2)
            assert row.ratio
            assert row.ratio.low < times * 1.03
            assert row.ratio.high > times / 1.03


def test_without_the_yardstick_a_slow_minute_is_taken_for_a_slow_program() -> None:
    """What it is there for: such rows are compared as they were measured, and a remark says so."""
    found = compare(simulated(0, beside=False), simulated(1, machine=1.6, beside=False))
    assert found.regressed
    assert [row.machine for row in found.rows] == [None, None]
    assert "no yardstick for some rows: their ratio has the machine's own change in it" in found.remarks


# ── noise ──────────────────────────────────────────────────────────────────────────────────────


def test_the_threshold_is_the_smallest_change_that_counts() -> None:
    a, b = simulated(0), simulated(1, times=1.1)
    assert compare(a, b, threshold=0.05).regressed
    found = compare(a, b, threshold=0.15)
    assert (found.regressed, found.rows[0].noise) == (False, 0.15)


def test_what_an_aa_pair_differs_by_is_no_change() -> None:
    """The second half of document b takes 30 % longer than the first: 10 % more is not worth a word."""
    a, b = simulated(0, beside=False), simulated(1, beside=False)
    again = next(b.select("unet", AGAIN)).rounds
    b = change(b, "unet", AGAIN, rounds=tuple(tuple(1.3 * value for value in turn) for turn in again))
    found = {row.workload: row for row in compare(a, b).rows}
    assert found["unet"].ratio
    assert found["unet"].ratio.value > 1.05
    assert found["unet"].noise == pytest.approx(0.3 / 1.3, abs=0.03)
    assert found["unet"].verdict == "same"
    assert found["vae_decoder"].noise == 0.05


def test_a_change_within_its_own_interval_is_no_change() -> None:
    """Six rounds that say 0.8, 1.15 and 1.2, twice."""
    a, b = (document([Row(side=OURS, workload="unet", rounds=turns * 2)]) for turns in (FLAT, UNSURE))
    found = compare(a, b)
    (row,) = found.rows
    assert found.remarks[-1] == "latentrt, unet: known within 20.0%; more rounds would say more"
    assert row.ratio is not None
    assert vars(row.ratio) == pytest.approx({"value": 1.15, "low": 0.8, "high": 1.2})
    assert row.verdict == "same"


# ── other rows ─────────────────────────────────────────────────────────────────────────────────


def test_a_row_that_fails_now_is_a_regression_and_one_that_failed_before_is_not() -> None:
    a = simulated(0)
    b = change(simulated(1), "unet", OURS, status="FAILED", reason="the output is not finite", rounds=())
    found = compare(a, b)
    assert found.regressed
    assert verdicts(found)["latentrt, unet"] == "FAILED"
    assert "the output is not finite" in found.format()
    back = compare(b, a)
    assert not back.regressed
    assert verdicts(back)["latentrt, unet"] == "not compared"


def test_a_peer_that_got_slower_or_fails_is_told_and_is_no_regression_of_ours() -> None:
    sides = ("diffusers", "openvino")
    a = document([Row(side=side, workload="unet", case=CASE, rounds=((1.0,),) * 6) for side in sides])
    b = change(a, "unet", "diffusers", rounds=((2.0,),) * 6)
    found = compare(a, change(b, "unet", "openvino", status="FAILED", rounds=()))
    assert verdicts(found) == {"diffusers, unet": "slower", "openvino, unet": "FAILED"}
    assert not found.regressed


def test_rows_of_one_document_alone_are_named() -> None:
    a, b = simulated(0), simulated(1)
    a = replace(a, rows=(*a.rows, Row(side="diffusers", workload="unet", case=CASE, rounds=((1.0,),))))
    b = change(b, "unet", OURS, case={**CASE, "steps": 21})
    found = compare(a, b)
    alone = ("only before: latentrt, unet", "only before: diffusers, unet", "only after: latentrt, unet")
    assert found.remarks[:3] == alone
    assert verdicts(found) == {"latentrt, vae_decoder": "same"}


def one_row(unit: str, rounds: Rounds) -> Document:
    return document([Row(side=OURS, workload="memory", unit=unit, rounds=rounds)])


def test_bytes_are_compared_directly() -> None:
    for after, verdict in ((1200.0, "larger"), (800.0, "smaller"), (1010.0, "same")):
        found = compare(one_row("B", ((1000.0,),)), one_row("B", ((after,),)))
        assert verdicts(found) == {"latentrt, memory": verdict}
        assert found.regressed == (verdict == "larger")


@pytest.mark.parametrize(
    ("unit", "rounds", "reason"),
    [
        ("s", (), "no samples before"),
        ("s", ((0.0,),) * 6, "a sample is not above zero"),
        ("s", ((1.0,),) * 5, "5 rounds, and less than 6 have no interval: --budget gives more"),
        ("dB", ((80.0,),) * 6, "in dB: its status says whether it is good enough"),
    ],
)
def test_rows_that_cannot_be_compared_say_why(unit: str, rounds: Rounds, reason: str) -> None:
    (row,) = compare(one_row(unit, rounds), one_row(unit, ((1.0,),) * 6)).rows
    assert (row.verdict, row.reason) == ("not compared", reason)


# ── documents ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("other", [{"cpu": "another"}, {"cores": 4}, {"gpu": {"name": "a GPU"}}])
def test_documents_of_other_models_verbs_and_machines_are_refused(other: dict[str, Any]) -> None:
    for changes in ({"model": {"name": "sd15"}}, {"benchmark": "memory"}, {"machine": {**MACHINE, **other}}):
        with pytest.raises(UsageError, match=r"different (models|verbs|machines)"):
            compare(document([]), document([], **changes))


def test_other_systems_and_settings_are_a_remark() -> None:
    changed = {**MACHINE, "python": "3.13.1", "commit": "4567def"}
    found = compare(document([]), document([], machine=changed, settings={"threads": 1}))
    assert found.remarks == (
        'different systems: python was null, is "3.13.1"',
        "different settings: threads was 2, is 1",
    )
    assert found.format().startswith(f"{DATE} 0123abc -> {DATE} 4567def\n")
