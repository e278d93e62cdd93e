import dataclasses
import itertools
import json

import numpy as np
import pytest

from latentrt.engines.errors import SamplerError
from latentrt.engines.noise_schedule import Level
from latentrt.engines.spec import HISTORY
from latentrt.runtime.sampling.table import Table, trace

LEVELS = [
    Level(900.0, 0.2, 0.96**0.5),
    Level(500.0, 0.6, 0.8),
    Level(100.0, 0.96**0.5, 0.2),
    Level(0.0, 1.0, 0.0),
]


def columns(**changes) -> dict:
    good = {
        "name": "toy",
        "prediction_type": "epsilon",
        "t": [900.0, 100.0],
        "p": [0.0, 0.0],
        "q": [1.0, 1.0],
        "a": [1.1, 1.2],
        "b": [[-0.3, 0.0], [-0.5, 0.1]],
        "c": [0.0, 0.25],
        "draws": [True, True],
        "alpha_bar": [0.1, 0.9],
        "init": 1.0,
    }
    return good | changes


def traced(formula, history="x0", prediction_type="sample", **kwargs) -> Table:
    return trace(formula, name="toy", history=history, prediction_type=prediction_type, **kwargs)


def walk(x, predict, noise):
    """DDIM on LEVELS."""
    del noise
    for s, t in itertools.pairwise(LEVELS):
        x0 = predict(x, s)
        x = t.alpha * x0 + t.sigma * (x - s.alpha * x0) / s.sigma
    return x


def test_a_good_table_is_kept_in_float64_and_frozen() -> None:
    source = np.array([1.1, 1.2])
    table = Table(**columns(a=source))
    source[0] = 5.0
    assert len(table) == 2
    assert table.history == 2
    assert table.a.dtype == np.float64
    assert table.a[0] == 1.1
    with pytest.raises(ValueError, match="read-only"):
        table.a[0] = 2.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.init = 2.0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": [1.0]}, r"column a has shape \(1,\)"),
        ({"b": [1.0, 1.0]}, r"column b has shape \(2,\)"),
        ({"t": [], **{k: [] for k in ("p", "q", "a", "b", "c", "draws", "alpha_bar")}}, "column t"),
        ({"p": [0.0, np.nan]}, "column p holds NaN"),
        ({"q": [np.inf, 0.0]}, "column q holds NaN or infinity"),
        ({"b": np.zeros((2, HISTORY + 1))}, "a history of 6"),
        ({"b": np.zeros((2, 0))}, "a history of 0"),
        ({"draws": [True, False]}, "noise in a row that draws none"),
        ({"init": 0.0}, "an initial scale of 0"),
        ({"init": float("nan")}, "an initial scale of nan"),
        ({"prediction_type": "flow"}, "prediction_type 'flow'"),
    ],
)
def test_a_bad_table_cannot_be_made(changes: dict, message: str) -> None:
    with pytest.raises(SamplerError, match=message):
        Table(**columns(**changes))


def test_format_is_aligned_and_complete() -> None:
    lines = Table(**columns()).format().splitlines()
    assert lines[0] == "toy: 2 UNet calls, history 2, epsilon, init 1.000000"
    assert lines[1].split() == ["row", "t", "alpha_bar", "p", "q", "a", "b0", "b1", "c", "noise"]
    assert lines[3].split() == [
        "1",
        "100",
        "0.900000",
        "0.000000",
        "1.000000",
        "1.200000",
        "-0.500000",
        "0.100000",
        "0.250000",
        "yes",
    ]
    assert len({len(line) for line in lines[1:]}) == 1


def test_json_makes_the_same_table() -> None:
    table = Table(**columns())
    again = Table(**json.loads(json.dumps(table.to_json())))
    assert again.format() == table.format()
    for column in ("t", "p", "q", "a", "b", "c", "draws", "alpha_bar"):
        np.testing.assert_array_equal(getattr(again, column), getattr(table, column))


def test_trace_reads_coefficients_off() -> None:
    table = traced(walk)
    assert table.history == 1
    np.testing.assert_allclose(table.a, [0.8 / 0.96**0.5, 0.2 / 0.8, 0], atol=1e-14)
    s, t = LEVELS[0], LEVELS[1]
    assert table.b[0, 0] == pytest.approx(t.alpha - t.sigma * s.alpha / s.sigma, abs=1e-14)
    np.testing.assert_allclose(table.b[-1], [1.0])
    np.testing.assert_allclose(table.alpha_bar, [0.04, 0.36, 0.96])
    assert table.t.tolist() == [900, 500, 100]
    assert not table.draws.any()
    assert table.init == pytest.approx(1)


@pytest.mark.parametrize("history", ["x0", "eps", "output"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_predictions_are_folded_into_p_and_q(history: str, prediction_type: str) -> None:
    """y = alpha*x0 + sigma*eps and m = the model's output must give back what the history holds."""
    x0, eps = 0.7, -1.3
    table = traced(walk, history, prediction_type)
    for i, level in enumerate(LEVELS[:3]):
        y = level.alpha * x0 + level.sigma * eps
        m = {"epsilon": eps, "v_prediction": level.alpha * eps - level.sigma * x0, "sample": x0}[
            prediction_type
        ]
        held = {"x0": x0, "eps": eps, "output": m}[history]
        assert table.p[i] * y + table.q[i] * m == pytest.approx(held)


def test_exploding_states_are_rescaled() -> None:
    """The same Euler run written for x = x0 + sigma*eps gives the variance-preserving table."""

    def euler(x, predict, noise):
        del noise
        for s, t in itertools.pairwise(LEVELS):
            high, low = s.sigma / s.alpha, t.sigma / t.alpha
            x = x + (x - predict(x, Level(s.t, 1.0, high))) / high * (low - high)
        return x

    ours, reference = traced(euler, x_scale=LEVELS[0].sigma / LEVELS[0].alpha), traced(walk)
    for column in ("t", "a", "b", "c", "alpha_bar", "p", "q"):
        np.testing.assert_allclose(getattr(ours, column), getattr(reference, column), atol=1e-14)
    assert ours.init == pytest.approx(LEVELS[0].sigma)


def test_history_is_discovered_and_anchored_where_the_state_is_large() -> None:
    """A state that nearly forgets its start (LCM): `a` must come from the noise drawn before."""

    def forgetful(x, predict, noise):
        for level in LEVELS[:3]:
            x = 1e-9 * x + predict(x, level) + 0.5 * noise()
        return x

    table = traced(forgetful)
    assert table.history == 1
    np.testing.assert_allclose(table.a, 1e-9, rtol=1e-6)
    np.testing.assert_allclose(table.c, 0.5)
    assert table.draws.all()


def test_draws_without_effect_are_kept() -> None:
    table = traced(lambda x, predict, noise: predict(x, LEVELS[0]) + 0 * noise())
    assert table.draws.tolist() == [True]
    assert table.c.tolist() == [0]


def test_two_noises_a_call_are_outside_the_form() -> None:
    with pytest.raises(SamplerError, match="outside the row form"):
        traced(lambda x, predict, noise: x + predict(x, LEVELS[0]) + noise() + noise())


def test_old_outputs_are_outside_the_form() -> None:
    def remembers_the_first(x, predict, noise):
        del noise
        first = predict(x, LEVELS[0])
        for _ in range(HISTORY):
            x = x + predict(x, LEVELS[1])
        return x + first

    with pytest.raises(SamplerError, match="outside the row form"):
        traced(remembers_the_first)


def test_infinite_coefficients_are_refused() -> None:
    def divides(x, predict, noise):
        del noise
        return x + predict(x, LEVELS[0]) / np.float64(LEVELS[3].sigma)

    with pytest.raises(SamplerError, match="divides by zero"):
        traced(divides)


def test_epsilon_without_signal_is_refused() -> None:
    silent = Level(999.0, 0.0, 1.0)
    with pytest.raises(SamplerError, match="prediction_type 'epsilon' at alpha_bar = 0"):
        traced(lambda x, predict, noise: predict(x, silent), prediction_type="epsilon")
