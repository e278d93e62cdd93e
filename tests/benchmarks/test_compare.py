"""`compare`, on documents of a machine that drifts, with noise that only ever slows down."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.benchmarks.records import Document, Rounds, Row, read_document
from latentrt.benchmarks.sides.contract import AGAIN, OURS, REFERENCES, YARDSTICK
from latentrt.benchmarks.verbs import detection
from latentrt.benchmarks.verbs.compare import Comparison, compare
from latentrt.engines.errors import UsageError

MACHINE = {"cpu": "a processor", "cores": 2, "gpu": None, "commit": "0123abc"}
CASE = {"width": 64, "height": 64, "steps": 20}
SECONDS = {"unet": 0.013, "vae_decoder": 0.019}


def simulated(
    seed: int, *, times: float = 1.0, machine: float = 1.0, rounds: int = 60, beside: bool = True
) -> Document:
    """A latency document: ours and ours again take `times` as long, on a machine `machine` times as slow.

    Within a document the machine gets slower by up to half and faster again; every fifth run is hit by
    something else that runs. Each process has half a percent of its own. `beside`: whether ours ran
    beside the yardstick as well, as short ones do.
    """
    random = np.random.default_rng(seed)
    rows: list[Row] = []
    for workload, seconds in SECONDS.items():
        drift = machine * (1.25 + 0.25 * np.sin(random.uniform(0, 6) + np.linspace(0, 6, rounds)))[:, None]

        def turns(base: float, drift: Any = drift) -> Rounds:
            shape = rounds, 4
            spikes = np.where(random.random(shape) < 0.2, random.exponential(0.5, shape), 0)
            found = base * random.normal(1, 0.005) * drift * (1 + spikes) * random.lognormal(0, 0.04, shape)
            return tuple(map(tuple, found.tolist()))

        for side in (OURS, AGAIN):
            rows.append(Row(side=side, workload=workload, case=CASE, rounds=turns(seconds * times)))
            if beside:
                over = turns(seconds * times / 0.012, drift / drift)
                figures = {"of": side, "yardstick_p50_s": 0.012 * float(np.median(drift))}
                row = Row(
                    side=YARDSTICK, workload=workload, case=CASE, unit="1", rounds=over, figures=figures
                )
                rows.append(row)
        rows.append(matmul(workload, turns(0.05)))
    return document(rows)


def matmul(workload: str, rounds: Rounds, **figures: Any) -> Row:
    facts = {"during": workload, "flops": 1e9, **figures}
    return Row(side="ceiling", workload="gemm", case=CASE, rounds=rounds, figures=facts)


def document(rows: Sequence[Row], **changes: Any) -> Document:
    facts: dict[str, Any] = {"benchmark": "latency", "model": {"name": "demo"}, "settings": {"threads": None}}
    return Document(
        **{**facts, "date": "2026-11-22T03:04:05+00:00", "machine": MACHINE, **changes}, rows=tuple(rows)
    )


def change(found: Document, workload: str, side: str, **changes: Any) -> Document:
    rows = [
        replace(row, **changes) if (row.workload, row.side) == (workload, side) else row for row in found.rows
    ]
    return replace(found, rows=tuple(rows))


def verdicts(found: Comparison) -> dict[str, str]:
    return {f"{row.side}, {row.workload}": row.verdict for row in found.rows}


# ── what it is for ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize(("times", "verdict"), [(1.1, "slower"), (1.0, "same"), (1 / 1.1, "faster")])
def test_a_planted_change_is_found_20_times_of_20(times: float, verdict: str, *, beside: bool) -> None:
    """20 pairs; the second machine is from half as fast to twice as fast."""
    for seed, machine in enumerate(2 ** np.linspace(-1, 1, 20)):
        before = simulated(2 * seed, beside=beside)
        found = compare(before, simulated(2 * seed + 1, times=times, machine=machine, beside=beside))
        assert found.regressed == (verdict == "slower")
        assert verdicts(found) == {"latentrt, unet": verdict, "latentrt, vae_decoder": verdict}
        if verdict == "slower":
            ratios = [row.ratio for row in found.rows if row.ratio]
            assert len(ratios) == 2
            assert all(ratio.low < 1.1 * 1.03 and ratio.high > 1.1 / 1.03 for ratio in ratios)


def test_without_the_yardstick_a_slow_minute_is_taken_for_a_slow_program() -> None:
    """What it is there for."""
    a, b = (
        replace(found, rows=tuple(row for row in found.rows if row.side not in REFERENCES))
        for found in (simulated(0), simulated(1, machine=1.6))
    )
    found = compare(a, b)
    assert found.regressed
    assert "no yardstick for some rows: their ratio has the machine's own change in it" in found.remarks
    assert not compare(simulated(0), simulated(1, machine=1.6)).regressed


# ── noise ──────────────────────────────────────────────────────────────────────────────────────


def test_the_threshold_is_the_smallest_change_that_counts() -> None:
    a, b = simulated(0), simulated(1, times=1.1)
    assert compare(a, b, threshold=0.05).regressed
    assert not compare(a, b, threshold=0.15).regressed
    assert compare(a, b, threshold=0.15).rows[0].noise == 0.15


def test_what_an_aa_pair_differs_by_is_no_change() -> None:
    """The second half of document b takes 30 % longer than the first: 10 % more is not worth a word."""
    a, b = simulated(0, beside=False), simulated(1, beside=False)
    again = next(b.select("unet", AGAIN)).rounds
    b = change(b, "unet", AGAIN, rounds=tuple(tuple(1.3 * value for value in turn) for turn in again))
    found = {row.workload: row for row in compare(a, b).rows}
    assert found["unet"].ratio is not None
    assert found["unet"].ratio.value > 1.05
    assert found["unet"].noise == pytest.approx(0.3 / 1.3, abs=0.03)
    assert found["unet"].verdict == "same"
    assert found["vae_decoder"].noise == 0.05


def test_a_change_within_its_own_interval_is_no_change() -> None:
    """Six rounds that say 0.8, 1.15 and 1.2, twice."""
    flat: Rounds = ((1.0,),) * 6
    a = document([Row(side=OURS, workload="unet", rounds=flat), matmul("unet", flat)])
    b = document(
        [Row(side=OURS, workload="unet", rounds=((0.8,), (1.15,), (1.2,)) * 2), matmul("unet", flat)]
    )
    a, b = (change(found, "gemm", "ceiling", case={}) for found in (a, b))
    found = compare(a, b)
    (row,) = found.rows
    assert found.remarks[-1] == "latentrt, unet: known within 20.0% only; more rounds would say more"
    assert row.ratio is not None
    assert row.machine == 1.0
    assert vars(row.ratio) == pytest.approx({"value": 1.15, "low": 0.8, "high": 1.2})
    assert row.verdict == "same"


def test_a_yardstick_of_another_shape_counts_by_the_operation() -> None:
    a, b = simulated(0, beside=False), simulated(1, beside=False)
    longer = [
        replace(
            row,
            rounds=tuple(tuple(3 * seconds for seconds in turn) for turn in row.rounds),
            figures={**row.figures, "flops": 3e9, "shape": [3]},
        )
        if row.workload == "gemm"
        else row
        for row in b.rows
    ]
    found = compare(a, replace(b, rows=tuple(longer)))
    for one, other in zip(found.rows, compare(a, b).rows, strict=True):
        assert one.ratio
        assert other.ratio
        assert (one.ratio.value, one.machine) == pytest.approx((other.ratio.value, other.machine))
    assert any("[3]" in remark for remark in found.remarks)


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
    a, b = (
        document(
            [
                Row(side="diffusers", workload="unet", case=CASE, rounds=((seconds,),) * 6),
                Row(side="openvino", workload="unet", case=CASE, status=status, rounds=rounds),
            ]
        )
        for seconds, status, rounds in ((1.0, "ok", ((1.0,),)), (2.0, "FAILED", ()))
    )
    found = compare(a, b)
    assert verdicts(found) == {"diffusers, unet": "slower", "openvino, unet": "FAILED"}
    assert not found.regressed


def test_rows_of_one_document_alone_are_named() -> None:
    a, b = simulated(0), simulated(1)
    a = replace(a, rows=(*a.rows, Row(side="diffusers", workload="unet", case=CASE, rounds=((1.0,),))))
    b = change(b, "unet", OURS, case={**CASE, "steps": 21})
    found = compare(a, b)
    assert found.only_before == ("latentrt, unet", "diffusers, unet")
    assert found.only_after == ("latentrt, unet",)
    assert "only before: diffusers, unet" in found.format()
    assert verdicts(found) == {"latentrt, vae_decoder": "same"}


def one_row(unit: str, rounds: Rounds) -> Document:
    return document([Row(side=OURS, workload="memory", unit=unit, rounds=rounds)])


@pytest.mark.parametrize(
    ("unit", "before", "after", "verdict"),
    [
        ("B", 1000.0, 1200.0, "larger"),
        ("B", 1200.0, 1000.0, "smaller"),
        ("1/s", 10.0, 8.0, "slower"),
        ("FLOP/s", 8.0, 7.9, "same"),
    ],
)
def test_bytes_and_rates_are_compared_directly(unit: str, before: float, after: float, verdict: str) -> None:
    found = compare(one_row(unit, ((before,),) * 6), one_row(unit, ((after,),) * 6))
    assert verdicts(found) == {"latentrt, memory": verdict}
    assert found.rows[0].machine is None
    assert found.regressed == (verdict in ("larger", "slower"))


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


def test_a_row_whose_rounds_are_not_its_yardsticks_is_compared_as_it_is() -> None:
    a, b = simulated(0, beside=False), simulated(1, beside=False)
    b = change(b, "unet", OURS, rounds=next(b.select("unet", OURS)).rounds[:-1])
    rows = {row.workload: row for row in compare(a, b).rows}
    assert rows["unet"].machine is None
    assert rows["vae_decoder"].machine is not None


# ── documents ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("other", [{"cpu": "another"}, {"cores": 4}, {"gpu": {"name": "a GPU"}}])
def test_documents_of_other_models_verbs_and_machines_are_refused(other: dict[str, Any]) -> None:
    for changes in ({"model": {"name": "sd15"}}, {"benchmark": "memory"}, {"machine": {**MACHINE, **other}}):
        with pytest.raises(UsageError, match=r"different (models|verbs|machines)"):
            compare(document([]), document([], **changes))


def test_a_threshold_is_a_share() -> None:
    for threshold in (0.0, 1.0, -0.1):
        with pytest.raises(UsageError, match="threshold"):
            compare(document([]), document([]), threshold=threshold)


def test_other_systems_and_settings_are_a_remark() -> None:
    changed = {**MACHINE, "python": "3.13.1", "commit": "4567def"}
    found = compare(document([]), document([], machine=changed, settings={"threads": 1}))
    assert found.remarks == (
        'different systems: python was null, is "3.13.1"',
        "different settings: threads was null, is 1",
    )
    assert "(0123abc) -> " in found.format()
    assert "(4567def)" in found.format()


def test_a_comparison_is_plain_data() -> None:
    data = json.loads(json.dumps(compare(simulated(0), simulated(1, times=1.1)).to_json(), allow_nan=False))
    assert data["regressed"] is data["compared"] is True
    ratio = data["rows"][0]["ratio"]
    assert ratio["low"] < ratio["value"] < ratio["high"]
    few = document([Row(side=OURS, workload="unet", rounds=((1.0,),))])
    assert not compare(few, few).compared


# ── the experiment ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("times", "caught"), [(1.1, 3), (1.0, 0)])
def test_trials_in_pieces_are_one_document(
    times: float, caught: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A slowdown that is not there is not caught."""
    path, asked = tmp_path / "detection.json", list[float]()

    def measure(slow_down: float) -> Document:
        asked.append(slow_down)
        return simulated(len(asked), times=times if slow_down else 1.0)

    code = 0 if caught else 1
    assert detection.main(["--out", str(path), "--pairs", "2"], measure) == code
    assert detection.main(["--out", str(path), "--pairs", "1", "--first", "2"], measure) == code
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"planted slowdown: right {caught} of 3 times",
        "A/A pair: right 3 of 3 times",
    ]
    assert [row.case["trial"] for row in read_document(path).rows] == [0, 0, 1, 1, 2, 2]
    slow = detection.PLANTED
    # trial 0: slow first; 1: last; 2 in a new run
    assert asked == [0.0, slow, 0.0, 0.0, slow, 0.0, slow, 0.0]
