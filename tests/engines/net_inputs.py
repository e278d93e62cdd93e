"""Random inputs that any net of the contract accepts."""

from collections.abc import Mapping

import numpy as np

from latentrt.engines.spec import DTYPES, NetSpec, shape_of


def input_shapes(spec: NetSpec, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    return {item.name: shape_of(item.shape, {"E": 1, "G": 1, "I": 1, **sizes}) for item in spec.inputs}


def random_inputs(
    spec: NetSpec, shapes: Mapping[str, tuple[int, ...]], seed: int = 0
) -> dict[str, np.ndarray]:
    """Token ids and shades below 99, no layer skipped, the rest normal."""
    random = np.random.default_rng(seed)
    arrays = {}
    for item in spec.inputs:
        shape, dtype = shapes[item.name], DTYPES[item.dtype]
        if item.name == "clip_skip":
            arrays[item.name] = np.zeros(shape, dtype)
        elif np.issubdtype(dtype, np.integer):
            arrays[item.name] = random.integers(0, 99, shape).astype(dtype)
        else:
            arrays[item.name] = random.standard_normal(shape).astype(dtype)
    return arrays
