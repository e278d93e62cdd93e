"""The two formulas against transcriptions in torch, of sd_emphasis.py and of encode_token_weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from latentrt.engines.errors import UsageError
from latentrt.runtime.prompts.chunks import interpolate_from_empty, scale_and_restore_mean


@pytest.fixture
def context() -> np.ndarray:
    return np.random.default_rng(3).normal(0.1, 1, (3, 77, 16)).astype(np.float32)  # (K, T, D)


@pytest.fixture
def weights() -> np.ndarray:
    weights = np.ones((3, 77), np.float32)
    weights[0, 1:9] = [1.1, 1.21, 0.5, 0.0, -1.5, 1.3, 2.0, 0.9]
    weights[2, 5] = 1.5
    return weights  # chunk 1 is as written


@pytest.fixture
def empty() -> np.ndarray:
    return np.random.default_rng(4).normal(0, 1, (77, 16)).astype(np.float32)


def _emphasis_original(z, multipliers):
    scaled = z * multipliers[..., None]
    return scaled * (z.mean() / scaled.mean())


def _encode_token_weights(z, multipliers, z_empty):
    factors = multipliers[..., None]
    return torch.where(factors == 1, z, (z - z_empty) * factors + z_empty)


def test_a1111_equals_emphasis_original(context, weights):
    ours = scale_and_restore_mean(context, weights)
    for chunk in range(3):  # one call of the reference for each chunk, with one prompt
        theirs = _emphasis_original(
            torch.from_numpy(context[chunk : chunk + 1]), torch.from_numpy(weights[chunk : chunk + 1])
        )
        np.testing.assert_allclose(ours[chunk], theirs.numpy()[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(ours[1], context[1])
    assert ours[0].mean(dtype=np.float64) == pytest.approx(context[0].mean(dtype=np.float64), rel=1e-5)


def test_comfyui_equals_encode_token_weights(context, weights, empty):
    ours = interpolate_from_empty(context, weights, empty)
    theirs = _encode_token_weights(*(torch.from_numpy(array) for array in (context, weights, empty)))
    np.testing.assert_array_equal(ours, theirs.numpy())
    np.testing.assert_array_equal(ours[weights == 1], context[weights == 1])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_weight_1_changes_no_bit(context, empty, dtype):
    context, ones = context.astype(dtype), np.ones((3, 77), np.float32)
    for same in (scale_and_restore_mean(context, ones), interpolate_from_empty(context, ones, empty)):
        assert same.dtype == dtype
        assert same.tobytes() == context.tobytes()


def test_a_mean_of_zero_is_not_restored():
    context, weights = np.ones((1, 2, 4), np.float32), np.array([[1, -1]], np.float32)
    np.testing.assert_array_equal(
        scale_and_restore_mean(context, weights)[0], context[0] * np.array([[1], [-1]], np.float32)
    )


def test_result_beyond_the_dtype(context, empty):
    weights = np.ones((3, 77), np.float32)
    weights[1, 4] = 1e38
    with pytest.raises(UsageError, match=r"largest weight is 1e\+38; expected weights whose effect float16"):
        interpolate_from_empty(context.astype(np.float16), weights, empty.astype(np.float16))
    weights[1, 4] = 3e38
    with pytest.raises(UsageError, match=r"largest weight is 3e\+38; expected weights whose effect float32"):
        scale_and_restore_mean(np.full_like(context, 5), weights)
