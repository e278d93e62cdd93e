import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from latentrt.runtime.loop.denoise import guide, guided_batch


def rows(count: int, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 4, 5, 7)).astype(dtype)


def test_layout_is_unconditional_first() -> None:
    latent = rows(3)
    np.testing.assert_array_equal(guided_batch(latent, guided=True), np.concatenate([latent, latent]))
    assert guided_batch(latent, guided=False) is latent


@pytest.mark.parametrize("rescale", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_combine_equals_diffusers(rescale: float, dtype: type) -> None:
    prediction = rows(6, dtype)
    text = torch.from_numpy(prediction[3:].astype(np.float32))
    uncond = torch.from_numpy(prediction[:3].astype(np.float32))
    expected = uncond + 7.5 * (text - uncond)
    if rescale:
        expected = rescale_noise_cfg(expected, text, guidance_rescale=rescale)
    found = guide(prediction, 7.5, rescale, guided=True)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-6, atol=2e-6)


def test_guidance_off_returns_the_rows() -> None:
    prediction = rows(2, np.float16)
    np.testing.assert_array_equal(guide(prediction, 1.0, 0.5, guided=False), prediction.astype(np.float32))
