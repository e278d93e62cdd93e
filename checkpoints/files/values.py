"""What a part's weights amount to, before anything is computed with them: finite, and within a net's type."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ...engines.errors import DAMAGED_WEIGHTS, EXPORT_IN_FP32, CheckpointError
from ...engines.processors import thread_count
from ...engines.safetensors_format import NOT_FINITE, magnitudes
from ...engines.spec import Array
from ..stored_types import numpy_type, seen_as
from .component import TensorHeader, read_tensors

_CHUNK = 2**20  # bytes that one thread looks at: they stay in its cache


def check_values(where: Path, tensors: Mapping[str, TensorHeader], dtype: str) -> None:
    """Read tensors once, on all processors, and check every number of them.

    Args:
        where: the folder or file of the part that has them, for messages.
        tensors: those that a net reads; integers among them are passed over.
        dtype: what the net computes in, "float16" or "float32". (An fp32 island's weights are fp16 too.)

    Raises:
        CheckpointError: a weight is not finite, or beyond `dtype`; the first in the order of `tensors`.
    """
    headers = {name: header for name, header in tensors.items() if header.dtype in NOT_FINITE}
    bits = {name: _bits(array, headers[name].dtype) for name, array in read_tensors(headers).items()}
    largest = _largest(bits)
    for name, header in headers.items():
        kind, limit = NOT_FINITE[header.dtype]
        what = f"{where}: the tensor {name!r}"
        if largest[name] >= limit:
            bad = int(np.count_nonzero(magnitudes(bits[name]) >= limit))
            raise CheckpointError(
                f"{what} has {bad} values of {bits[name].size} that are NaN or infinite",
                expected="finite weights",
                fix="Download the checkpoint again, or use another; no --dtype mends a broken merge.",
            )
        peak = seen_as(np.array([largest[name]], kind), numpy_type(header.dtype))
        found, most = float(peak[0]), float(np.finfo(dtype).max)
        if found > most:
            raise CheckpointError(
                f"{what} has values up to {found:.3g}",
                expected=f"at most {most:.5g}, the largest number of {dtype}",
                fix=EXPORT_IN_FP32 if dtype == "float16" else DAMAGED_WEIGHTS,
            )


def _bits(array: Array, dtype: str) -> Array:
    """A tensor's numbers as unsigned ones, in the order of memory: a transpose is not copied."""
    return seen_as(np.ravel(array, order="K"), NOT_FINITE[dtype][0])


def _largest(bits: Mapping[str, Array]) -> dict[str, int]:
    """The largest magnitude of each tensor, still as bits; 0 for one without numbers."""
    chunks = [
        (name, array[begin : begin + _CHUNK // array.itemsize])
        for name, array in bits.items()
        for begin in range(0, array.size, _CHUNK // array.itemsize)
    ]
    largest = dict.fromkeys(bits, 0)
    with ThreadPoolExecutor(thread_count(None)) as pool:
        for (name, _), found in zip(chunks, pool.map(_peak, (chunk for _, chunk in chunks)), strict=True):
            largest[name] = max(largest[name], found)
    return largest


def _peak(bits: Array) -> int:
    return int(magnitudes(bits).max())
