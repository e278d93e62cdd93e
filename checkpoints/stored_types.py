"""The types that checkpoints store weights in: as NumPy's types, converted into each other, and as bits.

NumPy has neither bfloat16 nor fp8. `ml_dtypes` adds them; onnx-ir has it as a dependency and means the same
types by `DataType.numpy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ..engines.spec import Array

# safetensors' name of a type -> NumPy's or ml_dtypes' name.
_NAMES: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


@cache
def numpy_type(name: str) -> np.dtype[Any]:
    """The NumPy type of numbers that safetensors calls `name`. Raises KeyError for a type of no weight."""
    import ml_dtypes

    spelled = _NAMES[name]
    return np.dtype(getattr(ml_dtypes, spelled, None) or spelled)


def seen_as(array: Array, kind: npt.DTypeLike) -> Array:
    """The same memory as numbers of another type: of the same size, where it is not contiguous."""
    return cast(Any, array).view(kind)  # NumPy's own types of `view` are incomplete


def convert(array: Array, name: str) -> Array:
    """The numbers in another type, `name`, rounded to nearest, ties to even; `array` itself if it has it.

    Every bit is as torch would have it, which rounds twice on the way from float64 to a narrow type: to
    float32 first. Two things are excepted: which of its NaNs a type gets, and numbers beyond float8_e4m3fn,
    which become NaN here and, by the release, its largest number in torch.
    """
    found, wanted = array.dtype, numpy_type(name)
    if found == wanted:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        if found.itemsize == 1:  # a table is four times as fast as ml_dtypes' conversion
            return _all_numbers(found, wanted)[seen_as(array, np.uint8)]
        if found == np.float64 and wanted.itemsize < 4:
            array = array.astype(np.float32)
        return array.astype(wanted)


@cache
def _all_numbers(found: np.dtype[Any], wanted: np.dtype[Any]) -> npt.NDArray[Any]:
    """Each of the 256 numbers of an fp8 type in another type."""
    return seen_as(np.arange(256, dtype=np.uint8), found).astype(wanted)
