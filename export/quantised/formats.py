"""The formats that products are rounded to, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...engines.spec import Array
from ...engines.tolerances import QUANTISED_PICTURE_DB, QUANTISED_RELATIVE_L2

LEAST = 1e-12  # of a scale: what is all zeros has one too


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format: what weights are stored in, and whether the data that they are multiplied with are rounded.

    Attributes:
        name: as users write it, and as the manifest has it.
        onnx: the type's name in ONNX.
        stored: safetensors' name of the type that the bytes are stored under.
        largest: what a weight's largest magnitude becomes.
        smallest: the most negative number; -largest where a type has one more that is not used.
        rounds_data: whether data are of the type too, with one scale; else weights alone are narrow.
        by_channel: whether each of the output's channels has its scale.
        smooths: whether data have steps of one size, as floats do not. Then it is worth to cut off the few
            that reach far, and to take channels that do into the weights.
        block: values of a weight along the products that share a scale; 0 is all of them.
        operators: whose weights.
        capability: of the oldest NVIDIA GPUs that compute with it (TensorRT's support matrix).
        bar: the largest relative L2 of a net's output, over all calls that it is compared on.
        picture_bar: the least dB of a picture, beside that of the package as it was.
    """

    name: str
    onnx: str
    stored: str
    largest: float
    smallest: float
    rounds_data: bool
    by_channel: bool
    smooths: bool = False
    block: int = 0
    operators: tuple[str, ...] = ("MatMul", "Conv")
    capability: str
    bar: float
    picture_bar: float

    def narrowed(self, values: Array) -> Any:
        """Values at scale 1 as the type's numbers, in bytes as they are stored, (…,) flat."""
        clipped: Any = np.minimum(np.maximum(values, self.smallest), self.largest)
        if self.onnx == "FLOAT8E4M3FN":
            import ml_dtypes

            small: Any = np.ravel(clipped.astype(ml_dtypes.float8_e4m3fn))
            return small.view(np.uint8)
        whole: Any = np.ravel(np.rint(clipped).astype(np.int8))
        if self.onnx == "INT8":
            return whole.view(np.uint8)
        pairs = (whole & 15).view(np.uint8).reshape(-1, 2)  # the first of two values in the low bits
        return pairs[:, 0] | (pairs[:, 1] << 4)

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a weight in its file: two values of four bits are a byte."""
        return (*shape[:-1], shape[-1] // 2) if self.onnx == "INT4" else shape


# Signed and with zero in the middle, which is what TensorRT takes; a byte a value, or half of one.
FORMATS: Mapping[str, Format] = {
    one.name: one
    for one in (
        Format(
            name="int8",
            onnx="INT8",
            stored="I8",
            largest=127,
            smallest=-127,
            rounds_data=True,
            by_channel=True,
            smooths=True,
            capability="7.5",
            bar=QUANTISED_RELATIVE_L2["int8"],
            picture_bar=QUANTISED_PICTURE_DB["int8"],
        ),
        Format(  # one scale for a tensor: a float's precision does not depend on it
            name="fp8",
            onnx="FLOAT8E4M3FN",
            stored="F8_E4M3",
            largest=448,
            smallest=-448,
            rounds_data=True,
            by_channel=False,
            capability="8.9",
            bar=QUANTISED_RELATIVE_L2["fp8"],
            picture_bar=QUANTISED_PICTURE_DB["fp8"],
        ),
        Format(  # weights alone: for cards that a model does not fit on otherwise
            name="int4",
            onnx="INT4",
            stored="U8",
            largest=7,
            smallest=-8,
            rounds_data=False,
            by_channel=True,
            block=64,
            operators=("MatMul",),
            capability="8.0",
            bar=QUANTISED_RELATIVE_L2["int4"],
            picture_bar=QUANTISED_PICTURE_DB["int4"],
        ),
    )
}
