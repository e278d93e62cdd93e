"""The formula of capacity plans, against a simulation of machines that nobody's formula is in."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from latentrt import UsageError
from latentrt.benchmarks.load.capacity import main, plan, stretch_at

Sizes = Callable[[np.random.Generator, int], np.ndarray]
SIZES: dict[str, Sizes] = {
    "all alike": lambda generator, count: np.ones(count),
    "exponential": lambda generator, count: generator.exponential(1, count),
    "many short, few long": lambda generator, count: np.where(generator.random(count) < 0.9, 0.4, 6.4),
}


def mean_stretch(load: float, machines: int, sizes: np.ndarray, *, least_busy: bool, seed: int) -> float:
    """Poisson arrivals at machines whose jobs share their time equally: seconds there over seconds alone."""
    generator = np.random.default_rng(seed)
    arrivals = np.cumsum(generator.exponential(sizes.mean() / (load * machines), len(sizes)))
    left: list[list[list[float]]] = [[] for _ in range(machines)]  # [work left, arrival, size] of each job
    clocks, stretches = [0.0] * machines, []

    def advance(machine: int, now: float) -> None:
        jobs, clock = left[machine], clocks[machine]
        while jobs:
            first = min(jobs, key=lambda job: job[0])
            work = first[0]
            ends = clock + work * len(jobs)
            if ends > now:
                break
            for job in jobs:
                job[0] -= work
            jobs.remove(first)
            clock = ends
            stretches.append((clock - first[1]) / first[2])
        for job in jobs:
            job[0] -= (now - clock) / len(jobs)
        clocks[machine] = now

    for arrival, size in zip(arrivals.tolist(), sizes.tolist(), strict=True):
        for machine in range(machines):
            advance(machine, arrival)
        counts = [len(jobs) for jobs in left]
        chosen = int(np.argmin(counts)) if least_busy else int(generator.integers(machines))
        left[chosen].append([size, arrival, size])
    return float(np.mean(stretches[len(stretches) // 10 :]))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_the_stretch_is_that_of_the_formula_whatever_the_sizes_are(load: float, sizes: str) -> None:
    drawn = SIZES[sizes](np.random.default_rng(1), 40_000)
    found = mean_stretch(load, 1, drawn, least_busy=False, seed=2)
    assert found == pytest.approx(stretch_at(load), rel=0.12)


def test_a_balancer_that_looks_is_better_than_the_formula() -> None:
    drawn = SIZES["exponential"](np.random.default_rng(1), 12_000)
    at_random, least_busy = (mean_stretch(0.7, 8, drawn, least_busy=looks, seed=3) for looks in (False, True))
    assert at_random == pytest.approx(stretch_at(0.7), rel=0.15)
    assert least_busy < 0.75 * at_random


@pytest.mark.parametrize(
    ("rate", "capacity", "stretch", "machines"),
    [(0.1, 1.0, 3.0, 1), (2.0, 1.5, 3.0, 2), (2.01, 1.5, 3.0, 3), (1000.0, 1.5, 2.0, 1334)],
)
def test_the_fewest_machines(rate: float, capacity: float, stretch: float, machines: int) -> None:
    found = plan(rate, capacity, stretch)
    assert found.machines == machines
    assert found.stretch <= stretch + 1e-9
    if machines > 1:
        assert rate / ((machines - 1) * capacity) > 1 - 1 / stretch, "one fewer is too few"
    assert plan(rate, capacity, stretch, spare=2).machines == machines + 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((0.0, 1.0, 3.0), "requests_per_second is 0"),
        ((1.0, -1.0, 3.0), "capacity is -1"),
        ((1.0, 1.0, 1.0), "stretch is 1"),
        ((float("inf"), 1.0, 2.0), "requests_per_second is inf"),
        ((1.0, float("nan"), 2.0), "capacity is nan"),
    ],
)
def test_numbers_that_no_load_has(given: tuple[float, float, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan(*given)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--requests-per-second", "20", "--capacity", "1.6"]) == 0
    assert capsys.readouterr().out.startswith("20 machines, 1 of them spare: each draws 66% of the time")
    assert main(["--requests-per-second", "20", "--capacity", "0"]) == 2
    assert "capacity is 0" in capsys.readouterr().err
