"""The graphs `step` and `step_masked` against the NumPy loop."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from latentrt.checkpoints.graphs.step import write_step
from latentrt.engines import spec
from latentrt.runtime.loop.calls import answered, at_once
from latentrt.runtime.loop.denoise import denoise, guide, guided_batch
from latentrt.runtime.loop.job import Kept
from latentrt.runtime.sampling.names import resolve
from latentrt.runtime.sampling.samplers import make_table

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
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_the_graph_draws_what_the_loop_draws(
    tmp_path: Path, sampler: str, scale: float, rescale: float, guided: bool, masked: bool
) -> None:
    session = _write_masked(tmp_path) if masked else _session(tmp_path, "float32")
    table = make_table(resolve(sampler, SCHEDULER), 8)
    random = np.random.default_rng(3)
    start = random.standard_normal((2, 4, 6, 10), np.float32)
    noises = random.standard_normal((len(table), *start.shape)).astype(np.float32)

    draws = iter(noises[table.draws])
    predict = lambda y, i: guide(_model(guided_batch(y, guided), i), scale, rescale, guided)  # noqa: E731
    mask = random.uniform(-0.5, 1.5, (2, 1, 6, 10)).clip(0, 1).astype(np.float32)
    picture = random.standard_normal(start.shape, np.float32)
    kept = Kept(latent=picture, noise=start, mask=mask) if masked else None
    *_, wanted = answered(denoise(table, lambda: next(draws), at_once(predict), table.init * start, kept))

    state = np.zeros((spec.HISTORY, *start.shape), np.float32)
    state[0] = table.init * start
    latent = guided_batch(state[0], guided)
    draws = iter(noises[table.draws])
    scales = np.full(len(table), scale, np.float32)
    for i, row in enumerate(table.packed_rows(scales, rescale)):
        noise = next(draws) if table.draws[i] else np.zeros_like(start)
        feeds = {"prediction": _model(latent, i), "state": state, "noise": noise, "row": row}
        if masked:
            feeds |= {"kept": picture, "kept_noise": start, "mask": mask}
        else:
            feeds["row"] = row[: len(spec.ROW)]
        state, latent = session.run(["next_state", "latent"], feeds)
    assert np.linalg.norm(state[0] - wanted.latent) <= 2e-6 * np.linalg.norm(wanted.latent)
    np.testing.assert_array_equal(latent, guided_batch(state[0], guided))


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


def _write_masked(tmp_path: Path, dtype: str = "float32") -> onnxruntime.InferenceSession:
    write_step(tmp_path / "masked.onnx", spec.step_masked(channels=4, float_dtype=dtype))
    return onnxruntime.InferenceSession(str(tmp_path / "masked.onnx"), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("rows", [2, 4], ids=["unguided", "guided"])
def test_outside_the_mask_the_picture_is_kept(tmp_path: Path, rows: int) -> None:
    """diffusers' blending (StableDiffusionInpaintPipeline): (1 - mask) * noised original + mask * latent."""
    random = np.random.default_rng(1)
    picture = (2, 4, 6, 10)
    feeds = {
        "prediction": random.standard_normal((rows, *picture[1:]), np.float32),
        "state": random.standard_normal((spec.HISTORY, *picture), np.float32),
        "noise": random.standard_normal(picture, np.float32),
        "row": random.uniform(0.1, 1, len(spec.ROW)).astype(np.float32),
    }
    plain, latent = _session(tmp_path, "float32").run(None, feeds)
    mask = random.integers(0, 2, (2, 1, 6, 10)).astype(np.float32)
    mask[0, 0, 0, :2] = 0.25
    kept, kept_noise = random.standard_normal((2, *picture), np.float32)
    signal, sigma = np.float32(0.8), np.float32(0.6)
    more = {"kept": kept, "kept_noise": kept_noise, "mask": mask}
    feeds["row"] = np.concatenate([feeds["row"], [signal, sigma]])
    assert spec.MASKED_ROW[-2:] == ("keep_signal", "keep_noise")
    state, masked = _write_masked(tmp_path).run(None, {**feeds, **more})
    wanted = mask * plain[0] + (1 - mask) * (signal * kept + sigma * kept_noise)
    np.testing.assert_allclose(state[0], wanted, rtol=1e-6, atol=1e-6)
    inside = np.broadcast_to(mask == 1, picture)
    np.testing.assert_array_equal(state[0][inside], plain[0][inside])
    np.testing.assert_array_equal(state[1:], plain[1:])  # what is remembered are predictions
    np.testing.assert_array_equal(masked, np.concatenate([state[0]] * (rows // 2)))
    assert latent.shape == masked.shape


def test_the_masked_graph_in_half_precision(tmp_path: Path) -> None:
    session = _write_masked(tmp_path, "float16")
    types = {item.name: item.type for item in session.get_inputs()}
    assert {name for name, kind in types.items() if kind == "tensor(float16)"} == {"prediction"}
    assert {"kept", "kept_noise", "mask"} < set(types)
