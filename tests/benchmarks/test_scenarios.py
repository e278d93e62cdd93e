"""The scenarios on a simulated clock, against queueing theory and the binomial distribution."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from latentrt.benchmarks.verbs.scenarios import (
    HostClock,
    Run,
    allowed_late,
    confidence,
    early_stopping,
    expected_rate,
    highest_rate,
    most_late,
    offline,
    poisson_arrivals,
    server,
    single_stream,
)

SERVICE = 0.2  # seconds


class Simulated:
    """A clock that only goes on when somebody waits or works."""

    def __init__(self) -> None:
        self.time = 1000.0  # a run must not think that it begins at 0
        self.served: list[int] = []

    def now(self) -> float:
        return self.time

    def wait_until(self, moment: float) -> None:
        self.time = max(self.time, moment)

    def worker(self, seconds: Callable[[int], float] = lambda batch: SERVICE) -> Callable[[int], None]:
        def serve(batch: int) -> None:
            self.served.append(batch)
            self.time += seconds(batch)

        return serve


def simulate(rate: float, count: int, seconds: Callable[[int], float] = lambda batch: SERVICE) -> Run:
    clock = Simulated()
    return server(clock.worker(seconds), poisson_arrivals(rate, count, seed=5), clock=clock)


# ── arrivals ───────────────────────────────────────────────────────────────────────────────────


def test_arrivals_are_a_poisson_process() -> None:
    arrivals = np.array(poisson_arrivals(rate=4.0, count=40_000, seed=3))
    gaps = np.diff(arrivals, prepend=0)
    assert stats.kstest(gaps, stats.expon(scale=1 / 4).cdf).pvalue > 0.01
    counts = np.histogram(arrivals, bins=np.arange(0, arrivals[-1]))[0]  # in each second
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.05)
    assert poisson_arrivals(4.0, 5, 3) == tuple(arrivals[:5])
    assert poisson_arrivals(4.0, 5, 4) != tuple(arrivals[:5])


# ── Server: one worker, one queue ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("load", "count"), [(0.2, 40_000), (0.5, 60_000), (0.7, 100_000)])
def test_mean_waiting_time_of_m_d_1(load: float, count: int) -> None:
    """Pollaczek-Khinchine for a constant service time: W = rho * s / (2 (1 - rho))."""
    run = simulate(load / SERVICE, count)
    waited = np.mean([query.waited for query in run.queries])
    assert waited == pytest.approx(load * SERVICE / (2 * (1 - load)), rel=0.04)


def waiting_m_d_1(t: float, load: float) -> float:
    """P(W <= t), Erlang 1909 (Gross et al., Fundamentals of Queueing Theory, M/D/1), in units of service."""
    terms = ((load * (k - t)) ** k / math.factorial(k) * math.exp(load * (t - k)) for k in range(int(t) + 1))
    return (1 - load) * sum(terms)


def test_tail_of_m_d_1() -> None:
    run = simulate(0.6 / SERVICE, 100_000)
    for percent in (50, 90, 99):
        waited = run.percentile(percent) / SERVICE - 1  # all are served for the same time
        assert waiting_m_d_1(waited, 0.6) == pytest.approx(percent / 100, abs=0.005)


def test_latencies_of_m_m_1_are_exponential() -> None:
    """With exponential service times too, latency is exponential with rate mu - lambda."""
    random = np.random.default_rng(8)
    run = simulate(0.5 / SERVICE, 50_000, lambda batch: random.exponential(SERVICE))
    wanted = stats.expon(scale=1 / (1 / SERVICE - 0.5 / SERVICE))
    for percent in (50, 90, 99):
        assert run.percentile(percent) == pytest.approx(wanted.ppf(percent / 100), rel=0.05)


def test_littles_law() -> None:
    """L = lambda W; L from the number present at moments that no query knows of."""
    run = simulate(0.8 / SERVICE, 20_000)
    moments = np.random.default_rng(1).uniform(0, run.seconds, 200_000)
    arrived = np.searchsorted([query.arrived for query in run.queries], moments)
    left = np.searchsorted([query.ended for query in run.queries], moments)
    present = float((arrived - left).mean())
    assert present == pytest.approx(run.samples_per_s * np.mean(run.latencies), rel=0.02)


def test_one_worker_does_one_thing_at_a_time() -> None:
    run = simulate(0.9 / SERVICE, 2000)
    for before, after in pairwise(run.queries):
        assert before.arrived < after.arrived
        assert after.began == pytest.approx(max(before.ended, after.arrived))


def test_queries_that_wait_are_served_together() -> None:
    clock = Simulated()
    arrivals = [0.0, 0.1, 0.2, 0.3, 5.0]
    run = server(clock.worker(lambda batch: 1.0), arrivals, most=2, clock=clock)
    assert clock.served == [1, 2, 1, 1]
    assert run.latencies == pytest.approx((1.0, 1.9, 1.8, 2.7, 1.0))
    assert [query.batch for query in run.queries] == [1, 2, 2, 1, 1]


def test_together_they_keep_up_with_more() -> None:
    """At one and a half times what single calls can do, the queue grows without end, but not in pairs."""
    arrivals = poisson_arrivals(1.5 / SERVICE, 5000, seed=2)
    alone, paired = Simulated(), Simulated()
    overloaded = server(alone.worker(), arrivals, clock=alone)
    assert overloaded.samples_per_s == pytest.approx(1 / SERVICE, rel=0.01)
    assert overloaded.latencies[-1] > 100 * SERVICE
    relieved = server(paired.worker(), arrivals, most=2, clock=paired)
    assert relieved.percentile(99) < 20 * SERVICE


def test_real_time() -> None:
    """The machine's clock: no query is served before it arrives, and waiting counts."""
    clock = HostClock()
    run = server(lambda batch: clock.wait_until(clock.now() + 0.02), [0.0, 0.005, 0.06])
    assert all(query.waited >= 0 for query in run.queries)
    assert run.queries[0].latency >= 0.02
    assert run.queries[1].latency >= 0.035
    assert run.seconds >= 0.08


# ── the others ─────────────────────────────────────────────────────────────────────────────────


def test_single_stream() -> None:
    clock = Simulated()
    durations = iter([0.5, 1.0, 2.0, 4.0, 8.0])
    run = single_stream(clock.worker(lambda batch: next(durations)), 3, 0.0, clock=clock)
    assert (run.latencies, run.seconds) == ((0.5, 1.0, 2.0), 3.5)
    clock = Simulated()
    assert len(single_stream(clock.worker(), 2, 1.9, clock=clock).queries) == 10  # of 0.2 s each
    clock = Simulated()
    assert len(single_stream(clock.worker(), 50, 0.0, budget=0.5, clock=clock).queries) == 3


def test_offline() -> None:
    clock = Simulated()
    run = offline(clock.worker(lambda batch: 0.1 + 0.2 * batch), 10, 4, clock=clock)
    assert clock.served == [4, 4, 2]
    assert run.latencies == pytest.approx((2.3,))
    assert run.samples_per_s == pytest.approx(10 / 2.3)


# ── the highest rate ───────────────────────────────────────────────────────────────────────────


def test_highest_rate_of_m_m_1() -> None:
    """p99 of M/M/1 is ln(100) / (mu - lambda): the highest rate within a deadline d is mu - ln(100) / d."""
    deadline, seeds = 3.0, list[int]()

    def meets(rate: float, seed: int) -> bool:
        seeds.append(seed)
        clock, random = Simulated(), np.random.default_rng(1000 + seed)
        worker = clock.worker(lambda batch: random.exponential(SERVICE))
        run = server(worker, poisson_arrivals(rate, 8_000, seed), clock=clock)
        return run.percentile(99) <= deadline

    found = highest_rate(meets, 0.0, 1 / SERVICE, 7, seed=40)
    assert found == pytest.approx(1 / SERVICE - math.log(100) / deadline, rel=0.06)
    assert seeds == list(range(40, 40 + len(seeds))), "fresh seeds"


def test_a_rate_that_was_luck_is_lowered() -> None:
    tried: list[float] = []

    def lucky(rate: float, seed: int) -> bool:
        tried.append(rate)
        return rate <= (0.6 if len(tried) <= 3 else 0.48)

    # 0.5 and then not 0.75, nor 0.625; 0.5 is not met again, 0.475 is
    assert highest_rate(lucky, 0.0, 1.0, 3) == pytest.approx(0.475)
    assert tried == pytest.approx([0.5, 0.75, 0.625, 0.5, 0.475])


def test_no_rate_at_all() -> None:
    assert highest_rate(lambda rate, seed: False, 0.0, 1.0, 4) is None
    assert highest_rate(lambda rate, seed: seed < 4, 0.0, 1.0, 4) is None


def test_other_runs_confirm() -> None:
    tried: list[float] = []

    def confirm(rate: float, seed: int) -> bool:
        tried.append(rate)
        assert seed == 9 + 2 + len(tried) - 1
        return rate < 2

    assert highest_rate(lambda rate, seed: rate < 3, 2.0, 4.0, 2, confirm=confirm, seed=9) == tried[-1]
    # 3 is not met, 2.5 is; then lowered by 5 %, by 10 %, by 20 %
    assert tried == pytest.approx([2.5, 2.5 * 0.95, 2.5 * 0.95 * 0.9, 2.5 * 0.95 * 0.9 * 0.8])
    assert highest_rate(lambda rate, seed: False, 2.0, 4.0, 2, confirm=lambda rate, seed: True) == 2.0


@pytest.mark.parametrize("deadline", [1.5, 3.0])
def test_expected_rate_of_m_m_1(deadline: float) -> None:
    services = np.random.default_rng(4).exponential(SERVICE, 20_000).tolist()
    wanted = 1 / SERVICE - math.log(100) / deadline
    assert expected_rate(services, deadline) == pytest.approx(wanted, rel=0.05)


def test_expected_rate_of_m_d_1() -> None:
    """At that load, by Erlang's formula, 99 % wait no longer than the deadline leaves them."""
    load = expected_rate([SERVICE], 4 * SERVICE) * SERVICE
    assert waiting_m_d_1(3.0, load) == pytest.approx(0.99, abs=0.001)
    assert expected_rate([SERVICE], 0.9 * SERVICE) == 0, "at no rate"


def test_a_run_ends_when_it_has_failed() -> None:
    clock = Simulated()
    arrivals = [0.0, 0.1, 0.2, 10.0, 20.0]
    run = server(clock.worker(lambda batch: 1.0), arrivals, deadline=1.5, allowed=0, clock=clock)
    assert run.latencies == pytest.approx((1.0, 1.9))
    clock = Simulated()
    run = server(clock.worker(lambda batch: 1.0), arrivals, deadline=1.5, allowed=1, clock=clock)
    assert run.latencies == pytest.approx((1.0, 1.9, 2.8))
    clock = Simulated()
    assert (
        len(server(clock.worker(lambda batch: 1.0), arrivals, deadline=1.5, allowed=2, clock=clock).queries)
        == 5
    )


# ── early stopping ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("percent", [90, 99])
def test_most_late_against_the_binomial_distribution(percent: float) -> None:
    for queries in (10, 43, 44, 64, 200, 459, 662, 24_576):
        allowed = np.flatnonzero(stats.binom.cdf(np.arange(3000), queries, 1 - percent / 100) <= 0.01)
        assert most_late(queries, percent) == (allowed[-1] if len(allowed) else None)


@pytest.mark.parametrize(("queries", "late"), [(32, 0), (168, 1), (459, 0), (662, 1), (24_576, 207)])
def test_confidence_against_the_binomial_distribution(queries: int, late: int) -> None:
    assert confidence(queries, late) == pytest.approx(1 - stats.binom.cdf(late, queries, 0.01), abs=1e-9)
    assert (confidence(queries, late) >= 0.99) == (late <= (most_late(queries, 99) or -1) or queries == 459)


@pytest.mark.parametrize("queries", [1, 64, 100, 101, 150, 200, 201, 662])
def test_what_may_be_late_leaves_the_percentile_in_time(queries: int) -> None:
    late = allowed_late(queries)
    latencies = [1.0] * (queries - late) + [100.0] * late
    assert np.percentile(latencies, 99) <= 1.0
    assert np.percentile([1.0] * (queries - late - 1) + [100.0] * (late + 1), 99) > 1.0


def test_early_stopping() -> None:
    latencies = np.random.default_rng(0).permutation(np.arange(1, 65)).tolist()
    assert early_stopping(latencies, 90) == 64  # 64 queries are LoadGen's least for p90: the maximum counts
    assert early_stopping(latencies[:63], 90) is None
    assert early_stopping(list(range(24_576)), 90) == pytest.approx(0.9 * 24_576, rel=0.006)
