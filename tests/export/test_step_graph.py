"""The graph `step` against the NumPy loop, and as an engine."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from latentrt.engines import spec
from latentrt.export.step_graph import write_step
from latentrt.runtime import guidance
from latentrt.runtime.denoise import denoise
from latentrt.runtime.samplers import make_table, resolve

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


def _session(tmp_path: Path, dtype: str) -> onnxruntime.InferenceSession:
    write_step(tmp_path / "model.onnx", spec.step(channels=4, float_dtype=dtype))
    return onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])


def _model(rows: np.ndarray, index: int) -> np.ndarray:
    """Any nonlinear function that tells the halves of a guided call apart."""
    return np.tanh(rows * 1.3 + np.linspace(-1, 1, len(rows), dtype=np.float32)[:, None, None, None] + index)


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_2m", "dpmpp_3m_sde", "pndm", "unipc", "heun"])
@pytest.mark.parametrize(
    ("scale", "rescale", "guided"), [(5.0, 0.0, True), (7.5, 0.7, True), (1.0, 0.0, False)]
)
def test_the_graph_draws_what_the_loop_draws(
    tmp_path: Path, sampler: str, scale: float, rescale: float, guided: bool
) -> None:
    session = _session(tmp_path, "float32")
    table = make_table(resolve(sampler, SCHEDULER), 8)
    random = np.random.default_rng(3)
    start = random.standard_normal((2, 4, 6, 10), np.float32)
    noises = random.standard_normal((len(table), *start.shape)).astype(np.float32)

    draws = iter(noises[table.draws])
    predict = lambda y, i: guidance.combine(_model(guidance.batch(y, guided), i), scale, rescale, guided)  # noqa: E731
    *_, wanted = denoise(table, lambda: next(draws), predict, start)

    state = np.zeros((spec.HISTORY, *start.shape), np.float32)
    state[0] = table.init * start
    latent = guidance.batch(state[0], guided)
    draws = iter(noises[table.draws])
    for i, row in enumerate(table.rows(scale, rescale)):
        noise = next(draws) if table.draws[i] else np.zeros_like(start)
        feeds = {"prediction": _model(latent, i), "state": state, "noise": noise, "row": row}
        state, latent = session.run(["next_state", "latent"], feeds)
    assert np.linalg.norm(state[0] - wanted.latent) <= 2e-6 * np.linalg.norm(wanted.latent)
    np.testing.assert_array_equal(latent, guidance.batch(state[0], guided))


def test_without_guidance_the_prediction_counts_to_the_bit(tmp_path: Path) -> None:
    session = _session(tmp_path, "float32")
    prediction = np.random.default_rng(0).standard_normal((1, 4, 2, 2), np.float32)
    row = np.zeros(len(spec.ROW), np.float32)
    row[spec.ROW.index("q")] = row[spec.ROW.index("b0")] = 1
    row[spec.ROW.index("guidance_scale")] = 3.3
    zeros = np.zeros((spec.HISTORY, 1, 4, 2, 2), np.float32)
    state, _ = session.run(None, {"prediction": prediction, "state": zeros, "noise": zeros[0], "row": row})
    np.testing.assert_array_equal(state[0], prediction)


def test_half_precision_is_the_unets_side_only(tmp_path: Path) -> None:
    session = _session(tmp_path, "float16")
    assert {item.name: item.type for item in (*session.get_inputs(), *session.get_outputs())} == {
        "prediction": "tensor(float16)",
        "state": "tensor(float)",
        "noise": "tensor(float)",
        "row": "tensor(float)",
        "next_state": "tensor(float)",
        "latent": "tensor(float16)",
    }
