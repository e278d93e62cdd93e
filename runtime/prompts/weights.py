"""Token weights, applied to the text encoder's output.

Sources of the formulas: `modules/sd_emphasis.py` of stable-diffusion-webui (`EmphasisOriginal`) and
`comfy/sd1_clip.py` of ComfyUI (`encode_token_weights`).
"""

from __future__ import annotations

import numpy as np

from ...engines.errors import UsageError
from ...engines.spec import Array


def scale_and_restore_mean(context: Array, weights: Array) -> Array:
    """AUTOMATIC1111's weighting: z * w, then scaled so that every chunk keeps its mean.

    Args:
        context: (K, T, D) float, the chunks of one prompt. Means are taken chunk by chunk, so that a picture
            does not depend on its batch.
        weights: (K, T) float32.

    Returns:
        (K, T, D) in the dtype of `context`; a chunk of weights 1 is as it was, to the bit.

    Raises:
        UsageError: a weight so large that the result is beyond its dtype.
    """
    weighted = np.array(context)
    for index in np.flatnonzero((weights != 1).any(axis=1)):
        z = context[index].astype(np.float32)  # (T, D)
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = z * weights[index, :, None]
            mean = scaled.mean(dtype=np.float64)
            ratio = z.mean(dtype=np.float64) / mean if mean else 1.0
            weighted[index] = scaled * np.float32(ratio)
    return _finite(weighted, weights)


def interpolate_from_empty(context: Array, weights: Array, empty: Array) -> Array:
    """ComfyUI's weighting: from the empty prompt's context (weight 0) to the prompt's (weight 1), and beyond.

    Args:
        context: (K, T, D) float, the chunks of one prompt.
        weights: (K, T) float32.
        empty: (T, D), the context of the empty prompt.

    Returns:
        (K, T, D) in the dtype of `context`; tokens of weight 1 are as they were, to the bit.

    Raises:
        UsageError: a weight so large that the result is beyond its dtype.
    """
    weighted = np.array(context)
    chunk, token = np.nonzero(weights != 1)
    z, origin = context[chunk, token].astype(np.float32), empty[token].astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        weighted[chunk, token] = (z - origin) * weights[chunk, token, None] + origin
    return _finite(weighted, weights)


def _finite(weighted: Array, weights: Array) -> Array:
    if not np.isfinite(weighted).all():
        raise UsageError(
            f"the prompt's largest weight is {np.abs(weights).max():g}",
            expected=f"weights whose effect {weighted.dtype} can hold",
            fix="Write smaller weights: (word:1.5) is a strong one.",
        )
    return weighted
