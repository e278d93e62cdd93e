"""Runs whose times can be told by hand, queueing theory, and schedules at random: by a clock that is set."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from itertools import chain, count, islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.benchmarks.case import Case
from latentrt.benchmarks.load.costs import Cost, MadeUpClock, gpu_like, measure_cost, simulated
from latentrt.benchmarks.load.open_loop import (
    Limits,
    Played,
    Policy,
    SteadyClock,
    draw,
    play,
    time_alone,
)
from latentrt.benchmarks.load.traffic import Kind, Request, arrivals, mix_of
from latentrt.engines.errors import BackendError
from latentrt.runtime.loop.calls import Pause
from latentrt.runtime.request.request import make_request
from tests.benchmarks.stand_in_side import PACKAGE

# A picture takes nothing but two calls of the UNet with two rows each, of three seconds.
COST = Cost(name="made up", fixed=1.0, each=1.0, begin=0.0, decode=0.0, pixels=64)
PLAIN = Kind(share=0.5, sampler="euler", steps=2, guidance_scale=3.0, width=8, height=8)
OTHER = Kind(share=0.25, sampler="ddim", steps=1, guidance_scale=3.0, width=8, height=8)
LARGE = Kind(share=0.25, sampler="euler", steps=2, guidance_scale=1.0, width=8, height=32)
ONE_BY_ONE = Policy(side="one at a time")
BATCHED = Policy(side="batched", pictures=8)
SHARED = Policy(side="shared", at_once=2)


def asked(*dues: tuple[float, Kind]) -> Iterator[Request]:
    """These requests, and nobody else for a long time."""
    later = ((1e9 + number, PLAIN) for number in count())
    for number, (due, kind) in enumerate(chain(dues, later)):
        yield Request(number=number, kind=kind, due=due)


def played(policy: Policy, *dues: tuple[float, Kind], cost: Cost = COST, **limits: Any) -> Played:
    clock = MadeUpClock()
    clock.sleep(100.0)  # times count from the beginning of the run
    bounds = Limits(**{"warm_up": 0, "counted": len(dues), **limits})
    return play(policy, bounds, asked(*dues), simulated(cost, clock), clock)


def ends(run: Played) -> list[tuple[int, float]]:
    return [(one.request.number, one.at) for one in run.finished]


# ── the ways to draw ───────────────────────────────────────────────────────────────────────────────


def test_one_at_a_time_each_waits_for_those_before_it() -> None:
    run = played(ONE_BY_ONE, (0, PLAIN), (1, PLAIN), (14, PLAIN))
    assert ends(run) == [(0, 6), (1, 12), (2, 20)]
    assert [one.latency for one in run.measured] == [6, 11, 6], "since they were due, not since they began"
    assert run.calls == ((3, 2), (6, 2), (9, 2), (12, 2), (17, 2), (20, 2))


def test_a_batch_has_what_is_equal_and_waits_and_is_never_held_back() -> None:
    dues = (0, PLAIN), (1, PLAIN), (2, OTHER), (3, PLAIN)
    run = played(BATCHED, *dues)
    assert ends(run) == [(0, 6), (1, 16), (3, 16), (2, 19)], "two calls of four rows, then one of two"
    assert [rows for _, rows in run.calls] == [2, 2, 4, 4, 2]
    few = played(Policy(side="batched", pictures=1), *dues)
    assert ends(few) == ends(played(ONE_BY_ONE, *dues)) == [(0, 6), (1, 12), (2, 15), (3, 21)]


def test_steps_are_shared_by_requests_that_are_not_equal() -> None:
    run = played(SHARED, (0, PLAIN), (1, OTHER), (2, OTHER))
    assert run.calls == ((3, 2), (8, 4), (11, 2)), "the second joins at the next step, the third has no place"
    assert ends(run) == [(0, 8), (1, 8), (2, 11)]
    assert played(SHARED, (0, PLAIN), (1, OTHER), rows=3).calls == ((3, 2), (6, 2), (9, 2))
    sizes = played(SHARED, (0, PLAIN), (0, LARGE))
    assert {rows for _, rows in sizes.calls} == {1, 2}, "other sizes are other calls"
    taken = np.diff([0.0, *(at for at, _ in sizes.calls)])
    assert sorted(taken) == [3, 3, 5, 5], "a large row takes four times as long"


def test_what_begins_and_ends_a_picture_takes_its_time() -> None:
    cost = Cost(name="made up", fixed=1.0, each=1.0, begin=10.0, decode=100.0, pixels=64)
    assert ends(played(ONE_BY_ONE, (0, PLAIN), cost=cost)) == [(0, 116)]
    assert ends(played(BATCHED, (0, PLAIN), (0, PLAIN), cost=cost)) == [(0, 230), (1, 230)]
    assert cost.alone(PLAIN) == 116
    assert cost.alone(LARGE) == 10 + 2 * 5 + 400


# ── what counts ────────────────────────────────────────────────────────────────────────────────────


def test_a_full_queue_refuses() -> None:
    run = played(ONE_BY_ONE, (0, PLAIN), (1, PLAIN), (2, PLAIN), (7, PLAIN), jobs=2)
    assert [one.number for one in run.refused] == [2]
    assert ends(run) == [(0, 6), (1, 12), (3, 18)]
    assert [one.request.number for one in run.measured] == [0, 1, 3]
    cost = Cost(name="made up", fixed=1.0, each=1.0, begin=0.0, decode=1.0, pixels=64)
    late = played(ONE_BY_ONE, (0, PLAIN), (1, PLAIN), (6.5, PLAIN), cost=cost, jobs=2)
    assert [one.number for one in late.refused] == [2], "it was full when the third arrived"


def test_the_first_do_not_count_and_it_is_busy_until_the_last_has_ended() -> None:
    dues = [(float(second), PLAIN) for second in range(0, 60, 7)]
    run = played(ONE_BY_ONE, *dues, warm_up=1, counted=2)
    assert [one.number for one in run.counted] == [1, 2]
    assert [one.request.number for one in run.measured] == [1, 2]
    assert run.seconds == 7
    assert [run.within(at) for at in (7, 8, 14, 15)] == [False, True, True, False]
    busy = played(SHARED, (0, PLAIN), (1, OTHER), counted=1)
    assert ends(busy) == [(0, 8)], "beside one that does not count"


def test_what_a_generation_raises_ends_the_run() -> None:
    def start(requests: Sequence[Request]) -> Generator[Any, None, None]:
        yield Pause()
        raise BackendError("out of memory", expected="memory", fix="Draw less.")

    clock = MadeUpClock()
    with pytest.raises(BackendError, match="out of memory"):
        play(ONE_BY_ONE, Limits(warm_up=0, counted=1), asked((0, PLAIN)), start, clock)
    with pytest.raises(BackendError, match="out of memory"):
        draw(start, next(asked((0, PLAIN))))


def test_real_seconds_pass() -> None:
    clock = SteadyClock()
    cost = Cost(name="made up", fixed=0.0, each=0.001, begin=0.0, decode=0.0, pixels=64)
    requests = asked((0.0, PLAIN), (0.05, PLAIN))
    run = play(ONE_BY_ONE, Limits(warm_up=0, counted=2), requests, simulated(cost, clock), clock)
    assert all(one.latency >= 0.004 for one in run.measured)
    assert run.finished[1].at >= 0.054, "it waits until the second is due"


def test_a_made_up_clock_goes_on_however_little_is_slept() -> None:
    assert ends(played(ONE_BY_ONE, (1e-20, PLAIN))) == [(0, pytest.approx(6))]
    clock = MadeUpClock()
    clock.sleep(0.0)
    assert clock.now() == 0


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_waiting_is_what_queueing_theory_says(load: float) -> None:
    """Poisson arrivals, equal service: Pollaczek and Khinchine, wait load / (2 (1 - load)) services."""
    cost = Cost(name="made up", fixed=0.0, each=1.0, begin=0.0, decode=0.0, pixels=64)
    kind = Kind(share=1.0, sampler="euler", steps=1, guidance_scale=1.0, width=8, height=8)
    clock = MadeUpClock()
    limits = Limits(warm_up=500, counted=6_000)
    run = play(ONE_BY_ONE, limits, arrivals((kind,), load, 3), simulated(cost, clock), clock)
    mean = float(np.mean([one.latency for one in run.measured]))
    assert mean - 1 == pytest.approx(load / (2 * (1 - load)), rel=0.15)


schedules = st.lists(
    st.tuples(st.floats(0, 3), st.sampled_from([PLAIN, OTHER, LARGE])), min_size=2, max_size=25
)


@settings(max_examples=300, deadline=None)
@given(
    schedules,
    st.sampled_from([ONE_BY_ONE, BATCHED, SHARED, Policy(side="shared", at_once=4)]),
    st.sampled_from([None, 1, 3]),
    st.integers(1, 6),
)
def test_nothing_is_lost_and_nothing_is_faster_than_alone(
    gaps: list[tuple[float, Kind]], policy: Policy, jobs: int | None, rows: int
) -> None:
    dues = np.cumsum([gap for gap, _ in gaps])
    asked_for = [(float(due), kind) for due, (_, kind) in zip(dues, gaps, strict=True)]
    run = played(policy, *asked_for, jobs=jobs, rows=rows)
    numbers = [one.request.number for one in run.finished] + [one.number for one in run.refused]
    assert sorted(numbers) == list(range(len(gaps)))
    assert jobs is not None or not run.refused
    assert all(one.latency >= COST.alone(one.request.kind) - 1e-9 for one in run.finished)
    drawn = sum(one.request.kind.rows * one.request.kind.steps for one in run.finished)
    assert sum(rows for _, rows in run.calls) == drawn


# ── costs ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_cost_is_measured_as_it_is() -> None:
    clock = MadeUpClock()
    cost = Cost(name="made up", fixed=0.3, each=0.2, begin=0.7, decode=1.1, pixels=64)
    found = measure_cost("found", simulated(cost, clock), PLAIN, clock, repeats=2)
    for name in ("fixed", "each", "begin", "decode"):
        assert getattr(found, name) == pytest.approx(getattr(cost, name)), name
    assert (found.name, found.pixels) == ("found", 64)
    alone = time_alone(simulated(cost, clock), (PLAIN, LARGE), 3, clock)
    assert alone == [pytest.approx([cost.alone(kind)] * 3) for kind in (PLAIN, LARGE)]


def test_a_line_that_begins_below_zero_has_nothing_fixed() -> None:
    clock = MadeUpClock()
    cost = Cost(name="made up", fixed=-0.1, each=0.2, begin=0.0, decode=0.0, pixels=64)
    assert measure_cost("found", simulated(cost, clock), PLAIN, clock).fixed == 0


def test_the_gpu_is_the_one_that_the_text_says() -> None:
    assert gpu_like(64).call(1, 64) == pytest.approx(13e-3)
    assert gpu_like(64).fixed / gpu_like(64).call(1, 64) == pytest.approx(0.6)


# ── traffic ────────────────────────────────────────────────────────────────────────────────────────


def test_arrivals_are_a_poisson_process_of_the_kinds_in_their_shares() -> None:
    kinds = (PLAIN, OTHER, LARGE)
    found = list(islice(arrivals(kinds, 4.0, 7), 20_000))
    gaps = np.diff([0.0, *(one.due for one in found)])
    assert gaps.min() > 0
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.05), "an exponential's deviation is its mean"
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.03
    for kind in kinds:
        assert sum(one.kind == kind for one in found) / 20_000 == pytest.approx(kind.share, abs=0.015)
    assert [one.number for one in found[:3]] == [0, 1, 2]


def test_another_rate_has_the_same_requests_and_another_seed_others() -> None:
    slow, fast, other = (
        list(islice(arrivals((PLAIN, OTHER, LARGE), *about), 50)) for about in ((1, 7), (4, 7), (1, 8))
    )
    assert [one.kind for one in slow] == [one.kind for one in fast]
    assert [one.due for one in slow] == pytest.approx([4 * one.due for one in fast])
    assert [one.due for one in slow] != [one.due for one in other]


def test_the_mix_is_mostly_of_the_size_that_was_asked_for() -> None:
    case = Case(width=128, height=192, guidance_scale=3.0, steps=20)
    kinds = mix_of(case, PACKAGE.manifest)
    assert sum(kind.share for kind in kinds) == pytest.approx(1)
    assert sum(kind.share for kind in kinds if kind.pixels == 128 * 192) > 0.9
    assert {(kind.width, kind.height) for kind in kinds} == {(128, 192), (64, 96)}
    assert {kind.rows for kind in kinds} == {1, 2}
    assert {kind.steps for kind in kinds} == {10, 20, 30, 50}
    assert len({kind.sampler for kind in kinds}) == 4
    for kind in kinds:
        request = make_request(PACKAGE.manifest, "", seed=1, **kind.parameters())
        assert len(request.schedule()) == kind.steps, "each step is one call, as simulations have it"
