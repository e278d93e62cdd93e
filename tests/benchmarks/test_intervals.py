"""Sides that take turns; intervals, spreads and lines of them against SciPy, NumPy and known answers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import scipy.stats

from latentrt.benchmarks.intervals import LEAST, Rounds, ab_spread, fit_line, ratio_by_round, ratio_of_runs
from latentrt.benchmarks.process import SideError
from latentrt.benchmarks.rounds import Pace, interleave

Pair = tuple[Rounds, Rounds]


def drifting(seed: int, rounds: int = 40, runs: int = 5, times: float = 1.0) -> Pair:
    """Two sides in turns on a machine up to twice as slow in some rounds; the first takes `times` as long."""
    random = np.random.default_rng(seed)
    slow = random.uniform(1, 2, (rounds, 1))
    a, b = (slow * random.lognormal(0, 0.05, (rounds, runs)) for _ in range(2))
    return (times * a).tolist(), b.tolist()


def test_the_intervals_are_scipys() -> None:
    """SciPy's own percentile bootstrap of the same statistic; 15 % of the width is the resamples' noise."""

    def check(found: Any, value: Any, *data: Any, **options: Any) -> None:
        assert found.value == pytest.approx(value)
        wanted = scipy.stats.bootstrap(
            data, method="percentile", n_resamples=5000, rng=np.random.default_rng(0), **options
        ).confidence_interval
        within = 0.15 * (wanted.high - wanted.low)
        assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=within)

    a, b = drifting(1, times=1.1)
    ratios = np.median(a, axis=1) / np.median(b, axis=1)
    check(ratio_by_round(a, b), np.median(ratios), ratios, statistic=np.median)
    # the rounds of each run are drawn on their own: a sample is a round's number
    count = np.arange(len(a))

    def statistic(one: Any, other: Any) -> float:
        return float(np.median(np.asarray(a)[one]) / np.median(np.asarray(b)[other]))

    value = np.median(a) / np.median(b)
    check(ratio_of_runs(a, b), value, count, count, statistic=statistic, vectorized=False)


def test_of_rounds_of_other_lengths_each_sample_counts() -> None:
    found = ratio_of_runs([(1.0, 5.0), (2.0,), (3.0, 4.0, 9.0)], [(1.0,)])
    assert (found.value, found.low, found.high) == (3.5, 2.0, 4.0)


@pytest.mark.parametrize("function", [ratio_by_round, ab_spread])
def test_sides_that_did_not_take_turns_are_refused(function: Callable[..., object]) -> None:
    for a, b in (([], []), ([(1.0,)], [(1.0,), (2.0,)])):
        with pytest.raises(ValueError, match="same number of rounds"):
            function(a, b)


def test_a_spread_is_a_share_whichever_half_is_slower() -> None:
    assert ab_spread([(1.0, 1.2), (2.0, 2.4)], [(1.1, 1.1), (2.2, 2.2)]) == pytest.approx(0.0)
    assert ab_spread([(1.0,)], [(0.8,)]) == pytest.approx(0.25)
    assert ab_spread([(0.8,)], [(1.0,)]) == pytest.approx(0.2)


def test_lines_are_scipys() -> None:
    random = np.random.default_rng(7)
    x = np.array([1, 2, 4, 8, 8, 20], float)
    y = 0.3 + 2.5 * x + random.normal(0, 0.4, 6)
    found, theirs = fit_line(x.tolist(), y.tolist()), scipy.stats.linregress(x, y)
    residual = np.abs(y - theirs.intercept - theirs.slope * x).max() / np.abs(y).max()
    wanted = {"slope": theirs.slope, "intercept": theirs.intercept, "residual": residual}
    assert found == pytest.approx(wanted)


def test_of_few_rounds_the_interval_is_their_range() -> None:
    a, b = drifting(8, rounds=LEAST - 1)
    found, values = ratio_by_round(a, b), np.median(a, axis=1) / np.median(b, axis=1)
    assert (found.low, found.high) == pytest.approx((values.min(), values.max()))


# ── sides that take turns ────────────────────────────────────────────────────────────────────────


@dataclass
class Side:
    """Takes `seconds` for a run, on a clock that all sides share; fails in its turn number `fails`."""

    name: str
    seconds: float
    calls: list[str]
    clock: list[float]
    fails: int | None = None
    turns: int = 0
    runs: list[int] = field(default_factory=list[int])

    def time(self, runs: int) -> tuple[tuple[float, ...], list[dict[str, Any]]]:
        self.turns += 1
        if self.turns == self.fails:
            raise SideError("FAILED", "it broke")
        self.calls.append(self.name)
        self.runs.append(runs)
        self.clock[0] += runs * self.seconds
        return (self.seconds,) * runs, [{"turn": self.turns}] * runs


def taking_turns(*seconds: float, fails: int | None = None, **more: Any) -> tuple[list[Side], dict[str, Any]]:
    """Sides `a`, `b`, …, the first of which fails, and what is found of them."""
    calls, clock = list[str](), [0.0]
    sides = [Side("abc"[i], value, calls, clock) for i, value in enumerate(seconds)]
    sides[0].fails = fails
    firsts = {side.name: side.seconds for side in sides} | more.pop("firsts", {})
    return sides, dict(interleave(sides, firsts, PACE, clock=lambda: clock[0], **more))


PACE = Pace(runs=50, rounds=4, budget=100.0, turn=0.25, most=40, warm_up=5)


def test_sides_take_turns_in_an_order_that_flips() -> None:
    sides, found = taking_turns(0.01, 0.02)
    assert sides[0].calls == ["a", "b", *"abbabaabab"], "warm-up, then as many rounds as 50 runs of b take"
    assert [len(turn) for turn in found["a"].rounds] == [25] * 5, "a quarter of a second"
    assert [len(turn) for turn in found["b"].rounds] == [12] * 5
    assert len(found["a"].figures) == 125, "one for each sample, without the warm-up's"
    assert {item["turn"] for item in found["a"].figures} == {2, 3, 4, 5, 6}


@pytest.mark.parametrize(("seconds", "rounds"), [((1.0, 1.0), 50), ((10.0, 10.0), 5), ((1000.0,), 3)])
def test_long_runs_get_the_rounds_that_fit(seconds: tuple[float, ...], rounds: int) -> None:
    """50 runs; 100 s are five rounds, besides a warm-up; and there are never fewer than three."""
    lines: list[str] = []
    _, found = taking_turns(*seconds, said=lines.append)
    assert {len(side.rounds) for side in found.values()} == {rounds}
    late = "3 rounds take about 3000 s, more than the budget of 100 s"
    assert lines[0] == (late if rounds == 3 else "round 1 of at most 50")


def test_a_turn_has_a_limit_and_a_slow_first_run_does_not_shorten_it() -> None:
    lines: list[str] = []
    _, found = taking_turns(0.01, firsts={"a": 5.0}, said=lines.append)
    assert [len(turn) for turn in found["a"].rounds] == [25] * 4
    assert lines == [f"round {i} of at most 4" for i in (1, 2, 3, 4)]
    (side,), _ = taking_turns(1e-6)
    assert side.runs == [6, 41, 41, 41, 41], "the first of a turn is not counted"
    assert interleave([], {}, PACE) == {}
    assert Pace.quick().budget < Pace().budget


def test_a_side_that_fails_drops_out() -> None:
    sides, found = taking_turns(0.01, 0.01, fails=3)
    assert (found["a"].status, found["a"].reason, len(found["a"].rounds)) == ("FAILED", "it broke", 1)
    assert (found["b"].status, len(found["b"].rounds)) == ("ok", 4)
    assert sides[0].calls == ["a", "b", "a", *"bbbb"]
